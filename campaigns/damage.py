"""Is every damage found, and does it cost no more than the one checkpoint that was hit?

A directory holds two checkpoints of a small LoRA-like state, saved by a CheckpointManager. The newer one is
injured in every way of campaigns/injuries.py: every bit flipped, every length, every byte, blocks, tails,
tensors and headers of another file, edited headers, other names. Of each injury it is required that

- ``validate`` finds it, and says in which file;
- ``load_latest`` gives the older checkpoint, bit for bit, and warns once, with the file and the reason;
- the damaged file stays where it is, byte for byte.

And of all injuries of the small kinds, and of some of each large one:

- a clean-up that keeps one checkpoint keeps the older one, since the damaged one counts for nothing;
- a save goes on beside it, and keeps the older one where two are to be kept;
- ``distrust verify`` fails and names it, and ``distrust prune`` with rules leaves it;
- ``distrust prune --damaged`` removes it, and nothing else; not, though, what is whole under a name that is
  not its own, which may be the only copy of its step.

Cases are numbered through the kinds in turn, each in an order drawn by the seed: the first hundred are of all
kinds, and once all were done every injury there is was. Then it begins again with another content.

    python -m campaigns.damage                       every injury once: some 80,000 cases
    python -m campaigns.damage --cases 300           some of each kind
    python -m campaigns.damage --seconds 3600        as many as that gives
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

from campaigns.campaign import Campaign, Case, CounterExample, parser, run
from campaigns.corruptions import NAME, OLDER_STEP, STEP, Files, Injury, Kind, kinds
from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import serialization
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.lock import LOCK_NAME
from distrust.cli import main as distrust
from distrust.errors import CorruptCheckpoint, DamagedCheckpointWarning

MEMORY = Path("/dev/shm")
OLDER = checkpoint_file_name(OLDER_STEP, "periodic")
#: Later than every name that an injury gives.
NEXT_STEP = 1000
#: A kind of no more injuries is looked into thoroughly; of a larger one, one case of so many.
SMALL_KIND = 1000
THOROUGH = 50
#: Of a generator's state: the rest of it is more of the same.
RNG_BYTES = 1024
SECTIONS = ("model", "optimizer", "rng", "history", "config", "metadata")


class Round:
    """Every injury of files of one content, in the order of its cases.

    Args:
        directory: a new one, for the two checkpoints.
        seed: of the content, and of the order.

    Attributes:
        directory: as given.
        older: the state of the checkpoint that is not injured.
        next: a later state.
        files: their files.
        size: how many injuries there are.
    """

    def __init__(self, directory: Path, seed: str) -> None:
        self.directory = directory
        self._chance = random.Random(seed)
        self.older = _state(OLDER_STEP, self._seed())
        self.next = _state(NEXT_STEP, self._seed())
        self.files = self._files()
        self._kinds = kinds(self.files)
        self._walks = [self._walk(kind.size) for kind in self._kinds]
        self.size = sum(kind.size for kind in self._kinds)
        directory.mkdir()
        (directory / OLDER).write_bytes(self.files.older)
        (directory / NAME).write_bytes(self.files.good)

    def _files(self) -> Files:
        newer, other = _state(STEP, self._seed()), _state(STEP, self._seed())
        return Files(
            good=_saved(newer), older=_saved(self.older), other=_saved(other), final=_saved(newer, final=True)
        )

    def place(self, number: int) -> tuple[Kind, int]:
        """The kind of a case and its number there: the kinds in turn, each in an order of its own."""
        done = 0
        for size in sorted({kind.size for kind in self._kinds}):
            left = [at for at, kind in enumerate(self._kinds) if kind.size > done]
            turns, turn = divmod(number, len(left))
            if done + turns < size:
                kind, (stride, first) = self._kinds[left[turn]], self._walks[left[turn]]
                return kind, (first + stride * (done + turns)) % kind.size
            number -= len(left) * (size - done)
            done = size
        raise IndexError(number)

    def _walk(self, size: int) -> tuple[int, int]:
        """A stride and a beginning, with which a walk comes to each number below ``size`` once."""
        stride = self._chance.randrange(size) if size > 1 else 1
        while math.gcd(stride, size) != 1:
            stride += 1
        return stride, self._chance.randrange(size)

    def _seed(self) -> int:
        return self._chance.randrange(2**32)

    @contextlib.contextmanager
    def injured(self, injury: Injury) -> Iterator[Path]:
        """The directory with the newer checkpoint injured; that is undone."""
        path = self.directory / injury.name
        if injury.name != NAME:
            (self.directory / NAME).unlink()
        path.write_bytes(injury.content)
        yield path
        if injury.name != NAME:
            path.unlink(missing_ok=True)
        (self.directory / NAME).write_bytes(self.files.good)


class Examination:
    """What is required of one injury.

    Args:
        campaign: for its counts.
        round_: the directory.
        injury: what was done.
        path: where the injured file is.
    """

    def __init__(self, campaign: Campaign, round_: Round, injury: Injury, path: Path) -> None:
        self._campaign = campaign
        self._round = round_
        self._directory = round_.directory
        self._injury = injury
        self._path = path

    def briefly(self) -> None:
        """What is required of every one."""
        self._validate()
        self._load()
        self._require_untouched("reading")
        self._campaign.count("validated, loaded from the one before")

    def thoroughly(self) -> None:
        """What takes longer."""
        self._clean_up()
        self._save()
        code, out, _ = _command("verify", self._directory)
        self._require(code == 1 and f"{self._path}: DAMAGED: " in out, f"verify says {out}")
        code, out, _ = _command("prune", self._directory, "--keep-last", 1)
        self._require((code, out) == (0, "nothing to remove\n"), f"prune --keep-last says {out}")
        _command("prune", self._directory, "--damaged", "--dry-run")
        self._require_untouched("prune --dry-run")
        self._prune()
        self._campaign.count("cleaned up, saved beside it, verified and pruned by commands")

    def _validate(self) -> None:
        try:
            CheckpointManager(self._directory).validate(self._path)
        except CorruptCheckpoint as error:
            text = str(error)
        else:
            raise CounterExample(f"{self._injury.what}: validate does not find it")
        self._require(_names(text, self._path), f"validate says {text!r}: neither file nor reason")

    def _load(self) -> None:
        with _recorded() as told:
            loaded = CheckpointManager(self._directory).load_latest(framework="torch")
        self._require_older(loaded)
        texts = [str(one.message).removeprefix("skipped a damaged checkpoint: ") for one in told]
        self._require(
            len(told) == 1 and told[0].category is DamagedCheckpointWarning and _names(texts[0], self._path),
            f"load_latest warns with {texts}",
        )

    def _clean_up(self) -> None:
        with _recorded(), CheckpointManager(self._directory, keep_last=1, keep_best=0) as manager:
            removed = manager.cleanup()
        self._require(removed == [], f"a clean-up removed {removed}")
        self._require_untouched("a clean-up")

    def _save(self) -> None:
        with _recorded(), CheckpointManager(self._directory, keep_last=2, keep_best=0) as manager:
            path = manager.save(self._round.next)
        self._require_untouched("a save", path.name)
        path.unlink()

    def _prune(self) -> None:
        code, out, err = _command("prune", self._directory, "--damaged")
        if self._injury.misnamed:
            self._require_untouched("prune --damaged")
            self._require(code == 0 and f"{self._path}: left: every byte is right" in err, f"prune: {err}")
            return
        self._require(code == 0 and f"removed {self._path} (" in out, f"prune --damaged says {out} {err}")
        there = _contents(self._directory)
        self._require(there == {OLDER: self._round.files.older}, f"prune --damaged leaves {[*there]}")
        with _recorded() as told:
            self._require_older(CheckpointManager(self._directory).load_latest(framework="torch"))
        self._require(not told, "load_latest warns of what is gone")

    def _require_older(self, loaded: Checkpoint) -> None:
        older = self._round.older
        same = all(_same(getattr(loaded, name), getattr(older, name)) for name in SECTIONS)
        self._require(loaded.step == OLDER_STEP and same, f"load_latest gives another state, {loaded.step}")

    def _require_untouched(self, by: str, *more: str) -> None:
        there = _contents(self._directory)
        wanted = {OLDER: self._round.files.older, self._path.name: self._injury.content}
        kept = {name: content for name, content in there.items() if name not in more}
        self._require(kept == wanted and len(there) == 2 + len(more), f"{by} leaves {sorted(there)}")

    def _require(self, kept: bool, otherwise: str) -> None:
        if not kept:
            raise CounterExample(f"{self._injury.what}: {otherwise}")


def examine(campaign: Campaign, case: Case, round_: Round) -> None:
    """One case.

    Raises:
        CounterExample: if a promise was not kept, or something else than what was promised was raised.
    """
    kind, number = round_.place(case.number % round_.size)
    injury = kind.make(number)
    if (injury.content, injury.name) == (round_.files.good, NAME):
        CheckpointManager(round_.directory).validate(STEP)
        campaign.count("injuries that change nothing: zeros zeroed, equals exchanged")
        return
    chosen = campaign.options.case is not None
    with round_.injured(injury) as path:
        examination = Examination(campaign, round_, injury, path)
        try:
            examination.briefly()
            if kind.size <= SMALL_KIND or case.chance.randrange(THOROUGH) == 0 or chosen:
                examination.thoroughly()
        except CounterExample:
            raise
        except Exception as error:
            raise CounterExample(f"{injury.what}: {type(error).__name__}: {error}") from error
    campaign.count(kind.name)


def search(campaign: Campaign) -> None:
    """Run the cases, in rounds."""
    options = campaign.options
    once = options.cases is None and options.seconds is None
    current, round_ = -1, None
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="damage-") as folder:
        for case in campaign.cases():
            if round_ is None:
                current, round_ = 0, Round(Path(folder) / "0", f"{options.seed}/0")
            wanted = case.number // round_.size
            if once and options.case is None and wanted:
                return
            if wanted != current:
                current, round_ = wanted, Round(Path(folder) / str(wanted), f"{options.seed}/{wanted}")
            examine(campaign, case, round_)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit code."""
    made = parser(__doc__)
    made.add_argument(
        "--directory",
        type=Path,
        default=_fastest_directory(),
        help="where to work; memory is quicker than a disk, and the same is found (default: %(default)s)",
    )
    return run("damage", made, search, cases=sys.maxsize, arguments=arguments)


def _fastest_directory() -> Path:
    return MEMORY if os.access(MEMORY, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def _state(step: int, seed: int) -> Checkpoint:
    """Small, and of all that a LoRA run holds."""
    chance = torch.Generator().manual_seed(seed)

    def random_(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=chance)

    model = {
        f"layers.{layer}.q_proj.lora_{part}": random_(2, 16) if part == "A" else random_(16, 2).bfloat16()
        for layer in range(2)
        for part in "AB"
    }
    moments = {
        number: {"step": torch.tensor(step), "exp_avg": random_(2, 16), "exp_avg_sq": random_(2, 16) ** 2}
        for number in range(2)
    }
    loss = float(random_(1))
    return Checkpoint(
        step=step,
        model=model,
        optimizer={"state": moments, "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.999), "params": [0, 1]}]},
        rng={"torch": chance.get_state()[:RNG_BYTES], "python": [3, None]},
        history={"loss": random_(step), "tokens": torch.arange(step)},
        config={"lora_rank": 2, "learning_rate": 2e-4, "model": "small"},
        metadata={"best_loss": loss, "note": "Grüße"},
        metrics={"eval_loss": loss},
    )


class _Frozen:
    """A clock that stands: the same case is to be the same bytes, whenever it is run."""

    @staticmethod
    def now(zone: tzinfo = UTC) -> datetime:
        return datetime(2026, 1, 1, tzinfo=zone)


def _saved(checkpoint: Checkpoint, *, final: bool = False) -> bytes:
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(serialization, "datetime", _Frozen),
        mock.patch("platform.node", return_value="host"),
        CheckpointManager(folder) as manager,
    ):
        return manager.save(checkpoint, final=final).read_bytes()


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != LOCK_NAME}


def _names(text: str, path: Path) -> bool:
    """Whether a message is of that file, and says more."""
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
def _recorded() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield told


def _command(*arguments: object) -> tuple[int, str, str]:
    """Run a command line of the product; its exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = distrust([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    sys.exit(main())
