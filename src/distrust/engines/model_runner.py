"""What both model runners share: the trial of packing, and losses summed for each example.

A runner packs several examples into one row only if the model keeps them independent. That is tested on a few
tokens and not inferred from the model's name: no output may change by one bit when the other example changes,
and each example must be, to rounding, what it is alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from distrust.contract import Losses

Array = np.ndarray[Any, Any]
#: (token ids int64[n], lengths of the examples) -> outputs float32[n, ...], and the dtype computed in.
Forward = Callable[[Array, list[int]], tuple[Array, str]]

#: Tokens of the two examples of the trial.
TRIAL_LENGTHS = [5, 7]
#: Largest difference of an example packed and alone, relative to the largest output.
TRIAL_TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}


def trial_ids(vocabulary: int, *, change: int | None = None) -> Array:
    """Token ids of two examples, int64[12]; ``change`` replaces all tokens of example 0 or 1."""
    ids = np.arange(sum(TRIAL_LENGTHS))
    example = np.repeat([0, 1], TRIAL_LENGTHS)
    shifted: Array = ids + len(ids) * (example == change)
    return shifted % vocabulary  # small vocabularies have fewer ids


def keeps_examples_independent(forward: Forward, *, vocabulary: int) -> bool:
    """Whether examples in one row do not influence each other, and are what they are alone."""
    cut = TRIAL_LENGTHS[0]
    try:
        packed, dtype = forward(trial_ids(vocabulary), TRIAL_LENGTHS)
        second_changed, _ = forward(trial_ids(vocabulary, change=1), TRIAL_LENGTHS)
        first_changed, _ = forward(trial_ids(vocabulary, change=0), TRIAL_LENGTHS)
        alone, _ = forward(trial_ids(vocabulary)[cut:], TRIAL_LENGTHS[1:])
    except Exception:  # a model's code may raise anything when it is called in an unforeseen way
        return False
    if not (
        np.array_equal(packed[:cut], second_changed[:cut])  # bit for bit: any leak shows
        and np.array_equal(packed[cut:], first_changed[cut:])
    ):
        return False
    difference = np.abs(packed[cut:] - alone).max()
    return bool(difference <= TRIAL_TOLERANCE.get(dtype, 0.0) * np.abs(alone).max())


def sum_per_example(losses: Array, weights: Array, examples: Array, *, count: int) -> Losses:
    """Sum losses [m] of trained tokens, plain and times ``weights`` [m], for each of ``count`` examples."""
    wide = losses.astype(np.float64)  # on the host: MPS has no float64
    return Losses(
        cross_entropy=np.bincount(examples, weights=wide, minlength=count),
        weighted=np.bincount(examples, weights=wide * weights, minlength=count),
    )
