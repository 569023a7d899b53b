"""What was converted is trained on by an engine, in a process that may die of it.

The process of torch makes the hostile folders, converts them, and goes on with what came of it: by
``DistrustTrainer``, for one step, with the options that the checkpoint knows. The process of mlx then goes on
with the same. Each ends well, or in an error of the library; its memory is limited; a native crash is seen by
the process that watches.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from random import Random

from campaigns.campaign import SKIPPED, CounterExample
from campaigns.fuzz import converting, corruptions, families, imports
from campaigns.fuzz.invariants import bound, require, require_plain, seconds
from campaigns.fuzz.worker import Worker
from distrust import CheckpointManager, TrainConfig
from distrust import config as options
from distrust.checkpoint import catalog
from distrust.errors import DistrustError, DistrustWarning, OutOfMemory

#: Of an engine: threads, and what torch and mlx keep.
ALLOWED_BYTES = 512 << 20
#: Of the processor: a model is loaded, and a step is made.
SECONDS = 10.0
TIMES = 2
AT_RANDOM = 12
CONVERTED = "folders of other programs given to convert"
GONE_ON = "of them gone on with"
_EXAMPLES = [{"text": "salt melts at nine"}, {"text": "the ore"}]

#: What a case does in the process of torch.
Work = Callable[["Bench", int], Counter[str]]


class Engines:
    """The processes. Each begins when it is needed.

    Args:
        work: what a case does.
        directory: for everything.
    """

    def __init__(self, work: Work, directory: Path) -> None:
        self._bench = Bench(directory)
        self._torch = Worker(
            lambda number: work(self._bench, number),
            allowed=ALLOWED_BYTES,
            prepare=lambda: self._bench.prepare("torch"),
        )
        self._mlx = Worker(
            lambda _: self._bench.go_on("mlx"),
            allowed=ALLOWED_BYTES,
            prepare=lambda: self._bench.prepare("mlx"),
        )

    def do(self, number: int) -> Counter[str]:
        """Do a case.

        Raises:
            CounterExample: if a promise was not kept.
        """
        if any(find_spec(name) is None for name in ("torch", "peft", "transformers")):
            return Counter({f"{SKIPPED}: folders of other programs need torch and peft": 1})
        counts = self._torch.do(number)
        if find_spec("mlx_lm") is not None:
            counts += self._mlx.do(number)
        return counts

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *exception: object) -> None:
        self._torch.__exit__()
        self._mlx.__exit__()


class Bench:
    """Where folders are harmed, converted, and gone on with; used inside the processes.

    Args:
        directory: for everything.
    """

    def __init__(self, directory: Path) -> None:
        self._goods = directory / "good"
        self._patients = directory / "patients"
        self._runs = directory / "runs"
        self._sound = directory / "sound"
        self._here = directory / "here"
        self._good: imports.Fixtures

    def prepare(self, engine: str) -> None:
        """Import what is needed, and go on with good ones: what that takes is not a hostile file's doing."""
        os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", OMP_NUM_THREADS="1")
        self._here.mkdir(parents=True, exist_ok=True)
        os.chdir(self._here)
        if engine == "torch":
            _be_silent()
            self._good = imports.make(self._goods)
            for kind in self._good.kinds:
                counts = self.try_out(kind, lambda _: None, Random(0))
                if counts[f"{CONVERTED}: converted"] != 1 or counts[f"{GONE_ON} torch: well"] != 1:
                    raise AssertionError(f"a good one of {kind} is not gone on with: {dict(counts)}")
            os.rename(self._runs, self._sound)
            self._clear()
            gc.freeze()  # what was imported stays: to look through it each time would take most of the time
            return
        counts = self.go_on(engine, self._sound)
        if set(counts) != {f"{GONE_ON} {engine}: well"}:
            raise AssertionError(f"good ones are not gone on with: {dict(counts)}")
        gc.freeze()

    def family(self, family: imports.Family, chance: Random) -> Counter[str]:
        """One kind of harm alone, a few times to each kind of folder."""
        self._clear()
        counts: Counter[str] = Counter()
        for kind in self._good.kinds:
            for _ in range(TIMES):
                counts += self.try_out(kind, family, chance)
        return counts

    def random(self, chance: Random) -> Counter[str]:
        """Some kinds of harm to some kinds of folders."""
        self._clear()
        counts: Counter[str] = Counter()
        for _ in range(AT_RANDOM):
            family = chance.choice([*imports.FAMILIES.values()])
            counts += self.try_out(chance.choice([*self._good.kinds]), family, chance)
        return counts

    def try_out(self, kind: str, family: imports.Family, chance: Random) -> Counter[str]:
        """Harm one, convert it, and go on with what came of it.

        Raises:
            CounterExample: if a promise was not kept.
        """
        patient = self._harmed(kind, family, chance)
        if patient is None:
            return Counter()
        run = self._runs / f"{len(list(self._runs.iterdir()))} {kind}"
        counts: Counter[str] = Counter()
        base = None if kind in ("whole",) or chance.random() < 0.5 else str(self._good.base)
        began = seconds()
        try:
            (done,) = converting.converted(patient.path, run, model=base)
            counts[f"{CONVERTED}: {done.outcome}"] += 1
        except CounterExample as found:
            raise CounterExample(f"{kind}: {found}") from found
        except DistrustError as error:
            counts[f"{CONVERTED}: {type(error).__name__}"] += 1
        took = seconds() - began
        # Twice converted, and hashed by the campaign besides.
        require(took <= 4 * bound(_nbytes(patient.path)), f"{kind}: convert: {took:.1f} s")
        require(not patient.canary.exists(), f"{kind}: a pickle was run")
        require(not any(self._here.iterdir()), f"{kind}: it wrote {[*self._here.iterdir()]}")
        if (
            not (run / catalog.RUN_SUBDIRECTORY).is_dir()
            or not catalog.scan(run / catalog.RUN_SUBDIRECTORY).files
        ):
            corruptions.clear(run)
            return counts
        copy = self._patients / "run"  # the other engine goes on with what this one found
        shutil.copytree(run, copy)
        counts[f"{GONE_ON} torch: {self._gone_on(copy, 'torch', run.name)}"] += 1
        return counts

    def go_on(self, engine: str, runs: Path | None = None) -> Counter[str]:
        """Go on with everything that was converted, or with these.

        Raises:
            CounterExample: if a promise was not kept.
        """
        counts: Counter[str] = Counter()
        for run in sorted((runs or self._runs).iterdir()):
            copy = self._runs.parent / f"run of {engine}"
            corruptions.clear(copy)
            shutil.copytree(run, copy)
            counts[f"{GONE_ON} {engine}: {self._gone_on(copy, engine, run.name)}"] += 1
            corruptions.clear(copy)
        gc.collect()
        return counts

    def _clear(self) -> None:
        gc.collect()  # an engine is a ring of objects
        corruptions.clear(self._runs)
        self._runs.mkdir()

    def _harmed(self, kind: str, family: imports.Family, chance: Random) -> imports.Victim | None:
        self._runs.mkdir(exist_ok=True)
        corruptions.clear(self._patients)
        self._patients.mkdir()
        good = self._good.kinds[kind]
        patient = imports.Victim(self._patients / good.name, kind, self._good, chance)
        if good.is_dir():
            shutil.copytree(good, patient.path)
        else:
            shutil.copyfile(good, patient.path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is made here, not of what reads it
                family(patient)
        except (*families.NOTHING_TO_CHANGE, OSError, RuntimeError):
            return None
        return patient

    def _gone_on(self, run: Path, engine: str, what: str) -> str:
        """How it ended."""
        began = seconds()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                _train(run, engine, imports.base_of(self._goods))
            said = "well"
        except OutOfMemory as error:
            raise CounterExample(f"{what}: {engine}: {error}") from error
        except DistrustError as error:
            require_plain(f"{what}: {engine}: the message", str(error))
            said = type(error).__name__
        except CounterExample:
            raise
        except BaseException as error:
            told = f"{type(error).__name__}: {str(error)[:500]!a}"
            raise CounterExample(f"{what}: {engine} goes on with it: {told}") from error
        for warning in caught:
            if issubclass(warning.category, DistrustWarning):
                require_plain(f"{what}: {engine}: the warning", str(warning.message))
        took = seconds() - began
        require(took <= SECONDS, f"{what}: {engine}: {took:.1f} s")
        return said


def _train(run: Path, engine: str, base: Path) -> None:
    """One step more."""
    from distrust import DistrustTrainer

    file = catalog.scan(run / catalog.RUN_SUBDIRECTORY).files[-1]
    asked = {
        "engine": engine,
        "model": str(base),
        "out": str(run),
        "max_steps": file.step + 1,
        "batch_size": 2,
        "weighting": "off",
        "threads": 1,
        "device": "cpu",
        "cache_dir": str(run / "cache"),
        "save_every": 0,
        "lora_rank": imports.RANK,  # not every format tells
    }
    config: TrainConfig = options.from_mapping({**asked, **file.header.config}, where=str(run))
    ended = DistrustTrainer(config, examples=_EXAMPLES).train()
    if ended.step != file.step + 1 or ended.path is None:
        raise CounterExample(f"{engine}: ended at step {ended.step}, not {file.step + 1}")
    CheckpointManager(run / catalog.RUN_SUBDIRECTORY).validate(ended.path)


def _be_silent() -> None:
    """What other libraries tell of loading is no finding."""
    logging = importlib.import_module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _nbytes(path: Path) -> int:
    """Of what there is to read; a sparse file is none."""
    files = [path, *(path.rglob("*") if path.is_dir() else ())]
    return sum(file.lstat().st_blocks * 512 for file in files if os.path.lexists(file))
