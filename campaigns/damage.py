"""Is all damage found, and does it cost no more than the one checkpoint that was hit?

A directory holds two checkpoints; the newer one is damaged in every way of ``corruptions``. ``validate`` must
find it, ``load_latest`` must give the older one with one warning, and the damaged file must stay as it is.
For all damages of small kinds, and some of large ones, clean-ups, saves and commands are checked as well.

    python -m campaigns.damage                       every damage once: about 80,000 cases
    python -m campaigns.damage --seed 1 --case 4711  one of them again
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from campaigns.campaign import Campaign, Case, CounterExample, parser, require, run
from campaigns.corruptions import NAME, OLDER_STEP, STEP, Damage, Files, Kind, kinds
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import serialization
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.lock import LOCK_NAME
from distrust.cli import main as distrust
from distrust.errors import CorruptCheckpoint, DamagedCheckpointWarning

MEMORY = Path("/dev/shm")  # a file system in memory
OLDER = checkpoint_file_name(OLDER_STEP, "periodic")  # the name of the older file
#: Later than every name that a damage gives.
NEXT_STEP = 1000
#: Every damage of a kind with no more than this is examined thoroughly; of a larger kind, one in so many.
SMALL_KIND = 1000
THOROUGH = 50
#: Of a generator's state: more bytes would test nothing new.
RNG_BYTES = 1024
SECTIONS = ("model", "optimizer", "rng", "history", "config", "metadata")


class Round:
    """Every damage to files of one content, in the order of its cases."""

    def __init__(self, directory: Path, seed: str) -> None:
        self.directory = directory  # a new one, for the two checkpoints
        self._rng = random.Random(seed)  # of the content, and of the order
        self.older = _state(OLDER_STEP, self._seed())  # the state of the checkpoint that is not damaged
        self.next = _state(NEXT_STEP, self._seed())  # a later state
        self.files = self._make_files()  # their files
        self._kinds = kinds(self.files)
        self._orders = [self._order(kind.size) for kind in self._kinds]
        self.size = sum(kind.size for kind in self._kinds)  # how many damages there are
        directory.mkdir()
        (directory / OLDER).write_bytes(self.files.older)
        (directory / NAME).write_bytes(self.files.newer)

    def _make_files(self) -> Files:
        newer, foreign = _state(STEP, self._seed()), _state(STEP, self._seed())
        return Files(_save(newer), _save(self.older), _save(foreign), _save(newer, final=True))

    def locate(self, number: int) -> tuple[Kind, int]:
        """The kind of a case and its number there: the kinds in turn, each in an order of its own."""
        finished = 0
        for size in sorted({kind.size for kind in self._kinds}):
            indices = [index for index, kind in enumerate(self._kinds) if kind.size > finished]
            turns, turn = divmod(number, len(indices))
            if finished + turns < size:
                kind, (stride, first) = self._kinds[indices[turn]], self._orders[indices[turn]]
                return kind, (first + stride * (finished + turns)) % kind.size
            number -= len(indices) * (size - finished)
            finished = size
        raise IndexError(number)

    def _order(self, size: int) -> tuple[int, int]:
        """A stride and a first number, which reach each number below ``size`` once."""
        stride = self._rng.randrange(size) if size > 1 else 1
        while math.gcd(stride, size) != 1:
            stride += 1
        return stride, self._rng.randrange(size)

    def _seed(self) -> int:
        return self._rng.randrange(2**32)

    @contextlib.contextmanager
    def damage(self, damage: Damage) -> Iterator[Path]:
        """Damage the newer checkpoint, and restore it afterwards; gives the damaged file."""
        path = self.directory / damage.name
        if damage.name != NAME:
            (self.directory / NAME).unlink()
        path.write_bytes(damage.content)
        yield path
        if damage.name != NAME:
            path.unlink(missing_ok=True)
        (self.directory / NAME).write_bytes(self.files.newer)


class Examination:
    def __init__(self, campaign: Campaign, round_: Round, damage: Damage, path: Path) -> None:
        self._campaign = campaign
        self._round = round_
        self._directory = round_.directory
        self._damage = damage
        self._path = path

    def run_quick(self) -> None:
        self._check_validate()
        self._check_load()
        self._require_untouched("reading")
        self._campaign.count("validated, loaded from the one before")

    def run_thorough(self) -> None:
        self._check_cleanup()
        self._check_save()
        code, out, _ = _command("verify", self._directory)
        self._require(code == 1 and f"{self._path}: DAMAGED: " in out, f"verify prints {out}")
        code, out, _ = _command("prune", self._directory, "--keep-last", 1)
        self._require((code, out) == (0, "nothing to remove\n"), f"prune --keep-last prints {out}")
        _command("prune", self._directory, "--damaged", "--dry-run")
        self._require_untouched("prune --dry-run")
        self._check_prune()
        self._campaign.count("cleaned up, saved beside it, verified and pruned by commands")

    def _check_validate(self) -> None:
        try:
            CheckpointManager(self._directory).validate(self._path)
        except CorruptCheckpoint as error:
            text = str(error)
        else:
            raise CounterExample(f"{self._damage.description}: validate does not find it")
        self._require(_names(text, self._path), f"validate raises {text!r}: no file or no reason")

    def _check_load(self) -> None:
        with _record_warnings() as caught:
            loaded = CheckpointManager(self._directory).load_latest(framework="torch")
        self._require_older(loaded)
        texts = [str(warning.message).removeprefix("skipped a damaged checkpoint: ") for warning in caught]
        is_one = [warning.category for warning in caught] == [DamagedCheckpointWarning]
        self._require(is_one and _names(texts[0], self._path), f"load_latest warns with {texts}")

    def _check_cleanup(self) -> None:
        with _record_warnings(), CheckpointManager(self._directory, keep_last=1, keep_best=0) as manager:
            removed = manager.cleanup()
        self._require(removed == [], f"a clean-up removed {removed}")
        self._require_untouched("a clean-up")

    def _check_save(self) -> None:
        with _record_warnings(), CheckpointManager(self._directory, keep_last=2, keep_best=0) as manager:
            path = manager.save(self._round.next)
        self._require_untouched("a save", path.name)
        path.unlink()

    def _check_prune(self) -> None:
        code, out, err = _command("prune", self._directory, "--damaged")
        if self._damage.misnamed:
            self._require_untouched("prune --damaged")
            self._require(code == 0 and f"{self._path}: left: every byte is right" in err, f"prune: {err}")
            return
        self._require(code == 0 and f"removed {self._path} (" in out, f"prune --damaged prints {out} {err}")
        contents = _contents(self._directory)
        self._require(contents == {OLDER: self._round.files.older}, f"prune --damaged leaves {[*contents]}")
        with _record_warnings() as caught:
            self._require_older(CheckpointManager(self._directory).load_latest(framework="torch"))
        self._require(not caught, "load_latest warns of a file that is gone")

    def _require_older(self, loaded: Checkpoint) -> None:
        older = self._round.older
        same = all(_same(getattr(loaded, name), getattr(older, name)) for name in SECTIONS)
        self._require(loaded.step == OLDER_STEP and same, f"load_latest gives another state, {loaded.step}")

    def _require_untouched(self, action: str, *new: str) -> None:
        contents = _contents(self._directory)
        expected = {OLDER: self._round.files.older, self._path.name: self._damage.content}
        old = {name: content for name, content in contents.items() if name not in new}
        same = old == expected and len(contents) == 2 + len(new)
        self._require(same, f"{action} leaves {sorted(contents)}")

    def _require(self, holds: bool, violation: str) -> None:
        require(holds, f"{self._damage.description}: {violation}")


def examine(campaign: Campaign, case: Case, round_: Round) -> None:
    """Run one case; an unexpected exception is a counterexample, too."""
    kind, number = round_.locate(case.number % round_.size)
    damage = kind.make(number)
    if (damage.content, damage.name) == (round_.files.newer, NAME):
        CheckpointManager(round_.directory).validate(STEP)
        campaign.count("damages that change nothing: zeros zeroed, equals exchanged")
        return
    repeated = campaign.options.case is not None
    with round_.damage(damage) as path:
        examination = Examination(campaign, round_, damage, path)
        try:
            examination.run_quick()
            if kind.size <= SMALL_KIND or case.rng.randrange(THOROUGH) == 0 or repeated:
                examination.run_thorough()
        except CounterExample:
            raise
        except Exception as error:
            raise CounterExample(f"{damage.description}: {type(error).__name__}: {error}") from error
    campaign.count(kind.name)


def search(campaign: Campaign) -> None:
    options = campaign.options
    once = options.cases is None and options.seconds is None
    current, round_ = -1, None
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="damage-") as folder:
        for case in campaign.cases():
            if round_ is None:
                current, round_ = 0, Round(Path(folder) / "0", f"{options.seed}/0")
            index = case.number // round_.size
            if once and options.case is None and index:
                return
            if index != current:
                current, round_ = index, Round(Path(folder) / str(index), f"{options.seed}/{index}")
            examine(campaign, case, round_)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__, writes=True)
    # Memory is quicker than a disk, and the findings are the same.
    options.set_defaults(directory=MEMORY if os.access(MEMORY, os.W_OK | os.X_OK) else None)
    return run("damage", options, search, cases=sys.maxsize, arguments=arguments)


def _state(step: int, seed: int) -> Checkpoint:
    """A small state with everything that a LoRA run has."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    model = {
        f"layers.{layer}.q_proj.lora_{part}": randn(2, 16) if part == "A" else randn(16, 2).bfloat16()
        for layer in range(2)
        for part in "AB"
    }
    moments = {
        number: {"step": torch.tensor(step), "exp_avg": randn(2, 16), "exp_avg_sq": randn(2, 16) ** 2}
        for number in range(2)
    }
    loss = float(randn(1))
    return Checkpoint(
        step=step,
        model=model,
        optimizer={"state": moments, "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.999), "params": [0, 1]}]},
        rng={"torch": generator.get_state()[:RNG_BYTES], "python": [3, None]},
        history={"loss": randn(step), "tokens": torch.arange(step)},
        config={"lora_rank": 2, "learning_rate": 2e-4, "model": "small"},
        metadata={"best_loss": loss, "note": "Grüße"},
        metrics={"eval_loss": loss},
    )


class _FrozenClock:
    """The same case has the same bytes, whenever it is run."""

    @staticmethod
    def now(zone: tzinfo = UTC) -> datetime:
        return datetime(2026, 1, 1, tzinfo=zone)


def _save(checkpoint: Checkpoint, *, final: bool = False) -> bytes:
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(serialization, "datetime", _FrozenClock),
        mock.patch("platform.node", return_value="host"),
        CheckpointManager(folder) as manager,
    ):
        return manager.save(checkpoint, final=final).read_bytes()


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != LOCK_NAME}


def _names(text: str, path: Path) -> bool:
    """Whether a message names that file, and gives a reason."""
    return text.startswith(f"{path}: ") and len(text) > len(f"{path}: ")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


@contextlib.contextmanager
def _record_warnings() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def _command(*arguments: object) -> tuple[int, str, str]:
    """Run a command of the product; its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = distrust([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    sys.exit(main())
