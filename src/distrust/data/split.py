"""A corpus -> what is trained on and what is kept out to evaluate on: a pure function of the seed."""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from distrust.data.corpus import Corpus
from distrust.data.sampler import derived_seed, permutation
from distrust.errors import ConfigError

#: Beyond the streams of the sources of a mix.
_STREAM = 1 << 32


def split_off(corpus: Corpus, fraction: float, *, seed: int) -> tuple[Corpus, Corpus]:
    """Keep out a share of each source.

    Args:
        corpus: all examples.
        fraction: the share, over 0 and under 1; rounded for each source, one example in all at least.
        seed: chooses which.

    Returns:
        What is trained on and what is evaluated on, without an example in common.

    Raises:
        ConfigError: there are too few examples.
    """
    sizes = corpus.sizes or (len(corpus),)
    kept_out = [min(int(fraction * size + 0.5), size - 1) for size in sizes]
    if not any(kept_out):
        kept_out[sizes.index(max(sizes))] = min(1, max(sizes) - 1)
    if not any(kept_out):
        raise ConfigError(f"--eval-fraction {fraction}: {len(corpus)} examples are too few to keep one out")
    evaluated = np.zeros(len(corpus), np.bool_)
    for source, (begin, size, count) in enumerate(
        zip([0, *accumulate(sizes)], sizes, kept_out, strict=False)
    ):
        drawn = permutation(size, seed=derived_seed(seed, _STREAM + source), epoch=0)
        evaluated[begin + drawn[:count]] = True
    return corpus.select(np.flatnonzero(~evaluated)), corpus.select(np.flatnonzero(evaluated))
