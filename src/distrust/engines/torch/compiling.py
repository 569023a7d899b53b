"""Layers compiled by torch, where that is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from distrust.errors import ConfigError


def compile_layers(model: Any) -> int:
    """Have torch compile the blocks that a model repeats, each when it is first run.

    One block at a time: blocks of one kind share their code, and attention, which is another computation for
    each batch of examples, stands between two graphs.

    Args:
        model: of transformers.

    Returns:
        How many blocks there are.

    Raises:
        ConfigError: if the model does not say what its blocks are.
    """
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    if not blocks:
        raise ConfigError("--compile: this model does not say which blocks it repeats; leave it out")
    for block in blocks:
        block.compile(dynamic=True)
    return len(blocks)


@contextlib.contextmanager
def compiler_errors() -> Iterator[None]:
    """What a compiler lacks is the user's to mend."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--compile: torch cannot compile this model here; leave it out ({reason})"
        ) from error
