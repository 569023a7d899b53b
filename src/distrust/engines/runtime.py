"""What both engines share: devices, seeds, the trial of packing, sums of losses.

A runner packs several examples into one row only if the model keeps them independent. That is tested on a few
tokens and not inferred from the model's name: no output may change by one bit when the other example changes,
and each example must be, to rounding, what it is alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from blake3 import blake3

from distrust.contract import LossSums
from distrust.data import IGNORED, MicroBatch
from distrust.engines.out_of_memory import raise_if_out_of_memory
from distrust.errors import ConfigError, ModelError

Array = np.ndarray[Any, Any]
#: (token ids int64[n], lengths of the examples) -> outputs float32[n, ...], and the dtype computed in.
Forward = Callable[[Array, list[int]], tuple[Array, str]]

#: Tokens of the two examples of the trial.
TRIAL_LENGTHS = [5, 7]
#: Largest difference of an example packed and alone, relative to the largest output.
TRIAL_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
#: Largest change by a later token, relative to the largest output; that of a small encoder is 0.002.
CAUSAL_TOLERANCE = 1e-4


def choose_device(requested: str, available: Mapping[str, bool], *, engine: str) -> str:
    """The device that ``--device`` selects; ConfigError if this machine, or this build, does not have it."""
    usable = [name for name, is_available in available.items() if is_available]
    if requested == "auto":
        return usable[0]
    if requested not in usable:
        raise ConfigError(
            f"--device {requested}: not available to {engine} here; give --device with one of: "
            f"auto, {', '.join(usable)}"
        )
    return requested


def micro_step_seed(*, seed: int, step: int, micro_step: int) -> int:
    """A 63-bit seed of a micro-step: a function of these three, so no earlier random draw can shift it."""
    digest = blake3(f"micro-step {seed} {step} {micro_step}".encode()).digest(8)
    return int.from_bytes(digest, "little") >> 1  # generators take a signed 64-bit integer


def trial_ids(vocabulary: int, *, change: int | None = None) -> Array:
    """Token ids of two examples, int64[12]; ``change`` replaces all tokens of example 0 or 1."""
    ids = np.arange(sum(TRIAL_LENGTHS))
    example = np.repeat([0, 1], TRIAL_LENGTHS)
    shifted: Array = ids + len(ids) * (example == change)
    return shifted % vocabulary  # small vocabularies have fewer ids


def trial_batch(vocabulary: int) -> MicroBatch:
    """The two examples as a micro-batch; every token but the first of each is trained."""
    ids, positions = trial_ids(vocabulary), np.concatenate([np.arange(length) for length in TRIAL_LENGTHS])
    return MicroBatch(
        input_ids=ids,
        positions=positions,
        cu_seqlens=np.cumsum([0, *TRIAL_LENGTHS], dtype=np.int32),
        labels=np.where(positions > 0, ids, IGNORED),
        weights=(positions > 0).astype(np.float32),
        distrust=np.zeros(2),
        examples=np.arange(2),
    )


def keeps_examples_independent(forward: Forward, *, vocabulary: int) -> bool:
    """Whether examples in one row do not influence each other, and are what they are alone."""
    cut = TRIAL_LENGTHS[0]
    try:
        packed, dtype = forward(trial_ids(vocabulary), TRIAL_LENGTHS)
        second_changed, _ = forward(trial_ids(vocabulary, change=1), TRIAL_LENGTHS)
        first_changed, _ = forward(trial_ids(vocabulary, change=0), TRIAL_LENGTHS)
        alone, _ = forward(trial_ids(vocabulary)[cut:], TRIAL_LENGTHS[1:])
    except Exception as error:  # a model's code may raise anything when it is called in an unforeseen way
        raise_if_out_of_memory(error)
        return False
    # Bit for bit: any leak shows.
    if not np.array_equal(packed[:cut], second_changed[:cut]):
        return False
    if not np.array_equal(packed[cut:], first_changed[cut:]):
        return False
    with np.errstate(invalid="ignore"):  # infinities
        difference = np.abs(packed[cut:] - alone).max()
    return bool(difference <= TRIAL_TOLERANCE.get(dtype, 0.0) * np.abs(alone).max())


def has_experts(modules: Iterable[tuple[str, object]]) -> bool:
    """Whether the modules, by full name, seem to be of a mixture of experts."""
    texts = (f"{name} {type(module).__name__}".lower() for name, module in modules)
    return any(word in text for text in texts for word in ("expert", "moe", "router", "switch"))


def require_causal(
    forward: Callable[[Array], tuple[Array, str]], *, vocabulary: int, name: str, experts: bool = False
) -> None:
    """Raise ModelError if an output changes with a later token, or if the model cannot compute at all.

    ``forward`` takes token ids int64[n] and returns outputs [n, ...] and the dtype computed in. With
    ``experts``, the tokens that go to one share its products, so their rounding may differ.
    """
    cut = TRIAL_LENGTHS[0]
    try:
        outputs, dtype = forward(trial_ids(vocabulary))
        later_changed, _ = forward(trial_ids(vocabulary, change=1))
    except Exception as error:  # a model's code may raise anything
        raise_if_out_of_memory(error)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(
            f"--model {name}: its forward pass fails on a few tokens ({reason}); if it works without an "
            "adapter, choose other --target-modules"
        ) from error
    prefix, changed_prefix = outputs[:cut], later_changed[:cut]
    if np.isnan(prefix).any() or np.isnan(changed_prefix).any():
        raise ModelError(f"--model {name}: its outputs for a few tokens are not numbers (NaN)")
    tolerance = TRIAL_TOLERANCE.get(dtype, 0.0) if experts else CAUSAL_TOLERANCE
    with np.errstate(invalid="ignore"):  # infinities may be equal; they stop the first step
        difference = np.where(prefix == changed_prefix, 0, np.abs(prefix - changed_prefix)).max()
    if not difference <= tolerance * np.abs(prefix[np.isfinite(prefix)]).max(initial=0):
        raise ModelError(
            f"--model {name}: is not causal: a later token changes the outputs before it, so the model would "
            "see the tokens that it is trained to predict; give a decoder, such as Llama or GPT-2"
        )


def sum_per_sequence(losses: Array, weights: Array, sequences: Array, *, count: int) -> LossSums:
    """Sum losses [m] of trained tokens, plain and times ``weights`` [m], for each of ``count`` sequences."""
    wide = losses.astype(np.float64)  # on the host: MPS has no float64
    plain, weighted = (np.bincount(sequences, values, count) for values in (wide, wide * weights))
    return LossSums(cross_entropy=plain, weighted=weighted)
