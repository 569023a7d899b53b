"""Data whose random numbers depend on seed, epoch and indices alone, not on what was fetched before.

A loader fetches ahead, in this process or in workers, so the random numbers that a collator or a data set
draws from the global generators depend on when the loader was started: after a resume they would be others.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from distrust.integrations.random import generators, set_generators


class PureData:
    """Makes the fetches of a loader pure. The epoch reaches its workers through shared memory.

    Args:
        seed: of the data; the numbers are others for each.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._epoch = multiprocessing.Value("q", 0, lock=False)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of what is fetched from now on."""
        self._epoch.value = epoch

    def wrap(self, loader: DataLoader[Any]) -> None:
        """Make the fetches of a loader of torch pure. It must not have been started yet."""
        state = _SavedGenerators()
        dataset = _SeededDataset(loader.dataset, self._seed, self._epoch, state)
        object.__setattr__(loader, "dataset", dataset)  # a loader refuses a new one
        loader.collate_fn = _RestoringCollator(loader.collate_fn, state)


class _SavedGenerators:
    """The generators of a process as they were before a fetch."""

    generators: dict[str, Any] | None = None


class _SeededDataset:
    """Seeds the global generators for each fetch, by its indices."""

    def __init__(self, dataset: Any, seed: int, epoch: Any, state: _SavedGenerators) -> None:
        self._dataset, self._seed, self._epoch, self._state = dataset, seed, epoch, state

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # its own, not set yet while it is unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)  # such as set_epoch

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Any:
        self._state.generators = generators()
        key = repr((self._seed, int(self._epoch.value), [int(index) for index in indices]))
        seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        if hasattr(self._dataset, "__getitems__"):
            return self._dataset.__getitems__(indices)
        return [self._dataset[index] for index in indices]


class _RestoringCollator:
    """Makes a batch, and sets the generators to what they were before the fetch."""

    def __init__(self, collator: Any, state: _SavedGenerators) -> None:
        self._collator, self._state = collator, state

    def __call__(self, examples: Any) -> Any:
        try:
            return self._collator(examples)
        finally:
            if self._state.generators is not None:
                set_generators(self._state.generators)
                self._state.generators = None
