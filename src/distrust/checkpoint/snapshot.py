"""The state as it was when a background save began: host memory that nobody else will change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from distrust.checkpoint.arrays import to_host

if TYPE_CHECKING:
    import numpy as np


def take(arrays: Iterable[Any]) -> list[np.ndarray[Any, Any]]:
    """The bytes of each array, uint8[nbytes]; those that lay in the caller's own memory are copied."""
    hosted = (to_host(array) for array in arrays)
    return [host.data.copy() if host.shared else host.data for host in hosted]
