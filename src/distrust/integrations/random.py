"""The global random number generators of a program: read them for a checkpoint, set them at a resume.

Only frameworks that the program has loaded are included; nothing is imported here.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from distrust.errors import ConfigError

_NUMPY = ("kind", "key", "position", "has_gauss", "cached")  # of its state


def generators() -> dict[str, Any]:
    """The state of every global generator: a tree for ``Checkpoint.rng``.

    Python's and numpy's (the global one of ``np.random``, not those of ``default_rng``); of torch the CPU's
    (uint8), and those of all CUDA devices and of MPS if in use; mlx's key (uint32[2]). The arrays are copies.
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "words": np.array(words, np.uint32), "gauss": gauss},
        "numpy": dict(zip(_NUMPY, _numpy_state(), strict=True)),
    }
    if torch := sys.modules.get("torch"):
        state["torch"] = torch.get_rng_state()  # a copy
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state_all()
        if torch.backends.mps.is_available():
            state["mps"] = torch.mps.get_rng_state()
    if mx := sys.modules.get("mlx.core"):
        state["mlx"] = np.array(mx.random.state[0])
    return state


def set_generators(state: Mapping[str, Any]) -> None:
    """Set every generator in ``state``, from :func:`generators`; arrays may be numpy's, torch's or lists.

    Raises:
        ConfigError: ``state`` has a generator that this process lacks: numbers drawn from it would differ.
    """
    if not state.keys() >= {"python", "numpy"}:
        raise ConfigError("set_generators takes what generators() returned: python and numpy are missing")
    cuda, python, legacy = state.get("cuda"), state["python"], dict(state["numpy"])
    _numpy_state()
    torch, mx = sys.modules.get("torch"), sys.modules.get("mlx.core")
    for name, available in (
        ("torch", torch is not None),
        ("cuda", torch is not None and torch.cuda.device_count() == len(cuda or ())),
        ("mps", torch is not None and torch.backends.mps.is_available()),
        ("mlx", mx is not None),
    ):
        if name in state and not available:
            devices = f"{len(cuda)} CUDA devices" if cuda and name == "cuda" else name
            raise ConfigError(
                f"the checkpoint has the random state of {devices}, which this process lacks: its numbers "
                "would differ. Import the library before, and use the same devices"
            )
    random.setstate((python["version"], tuple(np.asarray(python["words"]).tolist()), python["gauss"]))
    legacy["key"] = np.asarray(legacy["key"], np.uint32)
    np.random.set_state(tuple(legacy[name] for name in _NUMPY))
    if torch is not None and "torch" in state:
        torch.set_rng_state(torch.as_tensor(state["torch"], dtype=torch.uint8))
        if cuda:
            torch.cuda.set_rng_state_all([torch.as_tensor(each, dtype=torch.uint8) for each in cuda])
        if "mps" in state:
            torch.mps.set_rng_state(torch.as_tensor(state["mps"], dtype=torch.uint8))
    if mx is not None and "mlx" in state:
        high, low = np.asarray(state["mlx"]).tolist()
        mx.random.seed(high << 32 | low)  # a key is the two halves of its seed


def _numpy_state() -> Any:
    if np.random.get_state(legacy=False)["bit_generator"] != "MT19937":
        raise ConfigError("np.random has another bit generator than MT19937, which is not supported")
    return np.random.get_state()
