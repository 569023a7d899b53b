"""What is run: methods, worlds, and the training that all of them share.

Fixed before the grid was started, with one exception: the first seeds showed that clipping cancelled part of
the weights. The product was fixed (``--clipping weighted``), and every weighted method was run again;
``monotone-plain`` keeps the old clipping.

A *cell* is a method on a world with a share of wrong labels; a *run* is a cell with a seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

METHODS = ("before", "off", "additive", "published", "monotone", "monotone-plain", "filter", "upsample")
#: Without wrong labels only: what it shows needs no more.
CLIPPED_PLAINLY = "monotone-plain"
#: These do not depend on w and H. (The term that `additive` adds does, but no gradient does.) They are run
#: once, without wrong labels, and stand for every share of them.
BLIND = ("before", "off", "additive")
#: The bundled world; and those of `world.py`, by coordinated records for each primary one.
WORLDS = {"bundled": None, "1:5": 5, "1:20": 20, "1:50": 50}
#: Where the added term is trained: it must give what `off` gives, and needs no more worlds to show it.
ADDITIVE_IN = ("bundled", "1:5")
WRONG = (0.0, 0.1, 0.3)
SEEDS = (1, 2, 3, 4, 5)


@dataclass(frozen=True, slots=True)
class Training:
    """What all methods share. Attributes: `steps` of the bundled world, `harder_steps` of the others."""

    steps: int = 160
    harder_steps: int = 100
    batch_size: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    threads: int = 1
    neutral_records: int = 400

    def steps_of(self, world: str) -> int:
        return self.steps if world == "bundled" else self.harder_steps


#: To check that everything runs: its results mean nothing.
QUICK = Training(steps=2, harder_steps=2, batch_size=2, neutral_records=8)


@dataclass(frozen=True, slots=True)
class Run:
    """A method on a world, with a share of wrong labels, and a seed.

    The seed is that of the training and, except for the bundled world, of the world too.
    """

    world: str
    wrong: float
    method: str
    seed: int

    def __str__(self) -> str:
        labels = f", {self.wrong:.0%} wrong labels" if self.wrong else ""
        return f"{self.world}{labels}, {self.method}, seed {self.seed}"


def runs(worlds: Iterable[str], seeds: Iterable[int], methods: Iterable[str] = METHODS) -> Iterator[Run]:
    """All runs, seed by seed, so that whole seeds are complete when time is up."""
    worlds, methods = list(worlds), list(methods)
    for seed in seeds:
        for world in worlds:
            for wrong in WRONG if WORLDS[world] else WRONG[:1]:
                for method in methods:
                    if wrong and method in (*BLIND, CLIPPED_PLAINLY):
                        continue
                    if method == "additive" and world not in ADDITIVE_IN:
                        continue
                    yield Run(world, wrong, method, seed)
