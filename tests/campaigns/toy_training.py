"""``distrust train`` on the toy engine: the command, the loop and its saves, without the seconds of torch.

Each function is a command line of its own. The faults are those that a campaign must be able to find.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence

from distrust import Checkpoint, cli, engines
from distrust.contract import EngineState
from distrust.testing.toy_engine import ToyEngine
from distrust.training.loop import TrainingLoop
from distrust.training.saver import Saver


def main(arguments: Sequence[str]) -> int:
    return train(arguments, ToyEngine)


class Forgetful(ToyEngine):
    def load_state(self, state: EngineState) -> None:
        super().load_state(EngineState(state.model, self.state().optimizer, state.rng))


def forgets_the_optimizer(arguments: Sequence[str]) -> int:
    return train(arguments, Forgetful)


def stops_without_saving(arguments: Sequence[str]) -> int:
    save = TrainingLoop._save_unsaved

    def save_only_the_final_state(loop: TrainingLoop, *, final: bool) -> None:
        if final:
            save(loop, final=True)
        else:
            loop.saver.wait()

    TrainingLoop._save_unsaved = save_only_the_final_state
    return train(arguments, ToyEngine)


def keeps_few_steps(arguments: Sequence[str]) -> int:
    snapshot, numbers = Saver.snapshot, itertools.count()

    def keep_every_fourth(saver: Saver, make: Callable[[], Checkpoint], *, budget: float) -> None:
        if next(numbers) % 4 == 0:
            snapshot(saver, make, budget=budget)

    Saver.snapshot = keep_every_fourth
    return train(arguments, ToyEngine)


def train(arguments: Sequence[str], engine: type[ToyEngine]) -> int:
    engines.create_engine = lambda config, **_: engine()
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
