"""Hands the leader's checkpoint to all ranks: only the leader needs to see the folder of the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from distrust.checkpoint import Checkpoint, arrays, tree
from distrust.checkpoint.memory import allocate
from distrust.checkpoint.tree import STATE_SECTIONS
from distrust.contract import Engine
from distrust.ranks import Ranks, leads, of_leader

#: Values of a checkpoint besides its sections.
_PLAIN = ("step", "metrics", "measured_on", "run")


def load_on_all(ranks: Ranks, engine: Engine, load: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """What the leader loads, and has verified, on every rank, in host memory; None if there is none.

    Followers get an array at a time. If the engine has divided weights and moments, they get only their
    shapes and untouched memory, and it hands out the contents. An error of the leader ends all ranks.
    """
    if ranks.count == 1:
        return load()
    checkpoint = load() if leads(ranks) else None
    by_label: dict[str, Any] = {}
    layout: dict[str, Any] | None = None
    if checkpoint is not None:
        state = {name: getattr(checkpoint, name) for name in STATE_SECTIONS}
        skeletons, by_label = tree.flatten(state, is_array=arrays.is_array)
        described = arrays.describe(by_label).items()
        layout = {
            "skeletons": skeletons,
            "plain": {name: getattr(checkpoint, name) for name in _PLAIN},
            "arrays": {label: (*description, by_label[label].nbytes) for label, description in described},
        }
    description = of_leader(ranks, lambda: layout)
    if description is None:
        return None
    flats = arrays.flat_arrays(by_label)[0]
    for label, (dtype, shape, nbytes) in description["arrays"].items():
        memory = allocate(nbytes)
        block = np.frombuffer(memory, np.uint8)[:nbytes]
        if not (engine.peers and shape and label.startswith(("model.", "optimizer."))):
            if leads(ranks):
                arrays.fill(memory, 0, [flats[label]])
            ranks.broadcast(block)
        if not leads(ranks):
            by_label[label] = arrays.from_host(block, dtype, tuple(shape), framework=engine.framework)
    if checkpoint is not None:
        return checkpoint
    skeletons = description["skeletons"]
    sections = {name: tree.unflatten(skeletons[name], by_label.__getitem__) for name in STATE_SECTIONS}
    return Checkpoint(**sections, **description["plain"])
