"""A run resumes from what was converted, by each engine, in a process that may die of it.

Torch's process makes the hostile folders, converts them and resumes for one step; mlx's resumes from the
same. Each succeeds or raises an error of the library; its memory is limited, and a native crash is detected.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, Self

from campaigns.campaign import SKIPPED, CounterExample, require
from campaigns.fuzz import converting, corruptions, costs, families, imports
from campaigns.fuzz.invariants import bound, require_plain, seconds
from distrust import CheckpointManager
from distrust.checkpoint import catalog
from distrust.config_text import from_mapping
from distrust.errors import DistrustError, DistrustWarning, OutOfMemory

#: Of an engine: threads, and the caches of torch and mlx.
ALLOWED_BYTES = 512 << 20
#: Of the processor, to load a model and make a step.
SECONDS = 10.0
REPETITIONS = 2  # of a family on each kind of folder
RANDOM_FOLDERS = 6  # in a case
CONVERTED = "folders of other programs given to convert"  # label of the counts
RESUMED = "of them resumed"  # label of the counts
_EXAMPLES = [{"text": "salt melts at nine"}, {"text": "the ore"}]  # for one step

#: What a case does in the process of torch.
Work = Callable[[int], Counter[str]]


class Engines:
    """The processes of the engines; a context. Each starts when it is needed."""

    def __init__(self, work: Work, bench: Bench) -> None:
        worker = partial(costs.worker, allowed=ALLOWED_BYTES)
        self._torch = worker(work, prepare=lambda: bench.prepare("torch"))
        self._mlx = worker(lambda _: bench.resume_all("mlx"), prepare=lambda: bench.prepare("mlx"))

    def run(self, number: int) -> Counter[str]:
        if any(find_spec(name) is None for name in ("torch", "peft", "transformers")):
            return Counter({f"{SKIPPED}: folders of other programs need torch and peft": 1})
        counts: Counter[str] = Counter(self._torch.request(number))
        if find_spec("mlx_lm") is not None:
            counts += self._mlx.request(number)
        return counts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._torch.__exit__()
        self._mlx.__exit__()


class Bench:
    """Where folders are corrupted, converted and resumed from; used inside the processes."""

    def __init__(self, directory: Path) -> None:
        self._fixtures_folder = directory / "fixtures"
        self._victims = directory / "victims"
        self._runs = directory / "runs"
        self._valid_runs = directory / "valid"
        self._working = directory / "working"
        self._fixtures: imports.Fixtures

    def prepare(self, engine: str) -> None:
        """Import what is needed, and resume from valid folders: that memory is not due to a hostile file."""
        os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", OMP_NUM_THREADS="1")
        self._working.mkdir(parents=True, exist_ok=True)
        os.chdir(self._working)
        if engine == "torch":
            _silence_transformers()
            self._fixtures = imports.make(self._fixtures_folder)
            for kind in self._fixtures.kinds:
                counts = self.try_one(kind, lambda _: None, Random(0))
                if counts[f"{CONVERTED}: converted"] != 1 or counts[f"{RESUMED} torch: ok"] != 1:
                    raise AssertionError(f"a valid {kind} is not resumed from: {dict(counts)}")
            os.rename(self._runs, self._valid_runs)
            self._clear()
        else:
            counts = self.resume_all(engine, self._valid_runs)
            if set(counts) != {f"{RESUMED} {engine}: ok"}:
                raise AssertionError(f"valid folders are not resumed from: {dict(counts)}")
        gc.freeze()  # imported modules stay: each collection would spend most of its time on them

    def run_family(self, rng: Random, *, family: imports.Family) -> Counter[str]:
        pairs = [(kind, family) for kind in self._fixtures.kinds for _ in range(REPETITIONS)]
        return self._run_pairs(pairs, rng)

    def run_random(self, rng: Random) -> Counter[str]:
        kinds, every_family = [*self._fixtures.kinds], [*imports.FAMILIES.values()]
        pairs = [(rng.choice(kinds), rng.choice(every_family)) for _ in range(RANDOM_FOLDERS)]
        return self._run_pairs(pairs, rng)

    def try_one(self, kind: str, family: imports.Family, rng: Random) -> Counter[str]:
        victim = self._make_victim(kind, family, rng)
        if victim is None:
            return Counter()
        run = self._runs / f"{len(list(self._runs.iterdir()))} {kind}"
        counts: Counter[str] = Counter()
        base = None if kind == "full" or rng.random() < 0.5 else str(self._fixtures.base)
        began = seconds()
        try:
            (result,) = converting.convert_and_check(victim.path, run, model=base)
            counts[f"{CONVERTED}: {result.outcome}"] += 1
        except CounterExample as error:
            raise CounterExample(f"{kind}: {error}") from error
        except DistrustError as error:
            counts[f"{CONVERTED}: {type(error).__name__}"] += 1
        elapsed = seconds() - began
        # Converted twice, and hashed by the campaign besides.
        require(elapsed <= 4 * bound(_nbytes(victim.path)), f"{kind}: convert: {elapsed:.1f} s")
        require(not victim.canary.exists(), f"{kind}: a pickle was run")
        written = [*self._working.iterdir()]
        require(not written, f"{kind}: it wrote {written}")
        checkpoints = run / catalog.RUN_SUBDIRECTORY
        if not checkpoints.is_dir() or not catalog.scan(checkpoints).files:
            corruptions.clear(run)
            return counts
        copy = self._victims / "run"  # the other engine must find the run unchanged
        shutil.copytree(run, copy)
        counts[f"{RESUMED} torch: {self._resume(copy, 'torch', run.name)}"] += 1
        return counts

    def resume_all(self, engine: str, runs: Path | None = None) -> Counter[str]:
        """Resume from everything that was converted, or from these."""
        counts: Counter[str] = Counter()
        for run in sorted((runs or self._runs).iterdir()):
            copy = self._runs.parent / f"run of {engine}"
            corruptions.clear(copy)
            shutil.copytree(run, copy)
            counts[f"{RESUMED} {engine}: {self._resume(copy, engine, run.name)}"] += 1
            corruptions.clear(copy)
        gc.collect()
        return counts

    def _run_pairs(self, pairs: list[tuple[str, imports.Family]], rng: Random) -> Counter[str]:
        self._clear()
        counts: Counter[str] = Counter()
        for kind, family in pairs:
            counts += self.try_one(kind, family, rng)
        return counts

    def _clear(self) -> None:
        gc.collect()  # an engine is in a reference cycle
        corruptions.clear(self._runs)
        self._runs.mkdir()

    def _make_victim(self, kind: str, family: imports.Family, rng: Random) -> imports.Victim | None:
        self._runs.mkdir(exist_ok=True)
        corruptions.clear(self._victims)
        self._victims.mkdir()
        fixture = self._fixtures.kinds[kind]
        victim = imports.Victim(self._victims / fixture.name, kind, self._fixtures, rng)
        if fixture.is_dir():
            shutil.copytree(fixture, victim.path)
        else:
            shutil.copyfile(fixture, victim.path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the libraries that write the folder
                family(victim)
        except (*families.NOTHING_TO_CHANGE, OSError, RuntimeError):
            return None
        return victim

    def _resume(self, run: Path, engine: str, name: str) -> str:
        """``ok``, or the kind of the library's error."""
        began = seconds()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                _train_one_step(run, engine, imports.base_of(self._fixtures_folder))
            answer = "ok"
        except OutOfMemory as error:
            raise CounterExample(f"{name}: {engine}: {error}") from error
        except DistrustError as error:
            require_plain(f"{name}: {engine}: the message", str(error))
            answer = type(error).__name__
        except CounterExample:
            raise
        except BaseException as error:
            text = f"{type(error).__name__}: {str(error)[:500]!a}"
            raise CounterExample(f"{name}: resumed by {engine}: {text}") from error
        for warning in caught:
            if issubclass(warning.category, DistrustWarning):
                require_plain(f"{name}: {engine}: the warning", str(warning.message))
        elapsed = seconds() - began
        require(elapsed <= SECONDS, f"{name}: {engine}: {elapsed:.1f} s")
        return answer


def _train_one_step(run: Path, engine: str, base: Path) -> None:
    from distrust import DistrustTrainer

    file = catalog.scan(run / catalog.RUN_SUBDIRECTORY).files[-1]
    options: dict[str, Any] = {"engine": engine, "model": str(base), "out": str(run), "weighting": "off"}
    options["cache_dir"] = str(run / "cache")
    options |= {"max_steps": file.step + 1, "batch_size": 2, "save_every": 0, "threads": 1, "device": "cpu"}
    options["lora_rank"] = imports.RANK  # not every format contains it
    config = from_mapping({**options, **file.header.config}, where=str(run))
    result = DistrustTrainer(config, examples=_EXAMPLES).train()
    if result.step != file.step + 1 or result.path is None:
        raise CounterExample(f"{engine}: ended at step {result.step}, not {file.step + 1}")
    CheckpointManager(run / catalog.RUN_SUBDIRECTORY).validate(result.path)


def _silence_transformers() -> None:
    logging = importlib.import_module("transformers.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _nbytes(path: Path) -> int:
    """Bytes on disk: a sparse file has none."""
    files = [path, *(path.rglob("*") if path.is_dir() else ())]
    return sum(file.lstat().st_blocks * 512 for file in files if os.path.lexists(file))
