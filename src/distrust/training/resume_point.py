"""Where a run begins: from nothing, from its newest checkpoint, or from an older one on request."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from distrust.checkpoint import Checkpoint, CheckpointFile, CheckpointManager, Scan, foreign
from distrust.checkpoint.catalog import RUN_SUBDIRECTORY, list_names
from distrust.checkpoint.foreign import require_converted
from distrust.checkpoint.remote.location import is_url, parse
from distrust.config import TrainConfig
from distrust.config_text import RUN_CONFIG, from_toml
from distrust.contract import Engine
from distrust.errors import ConfigError, CorruptCheckpoint, RanksDiffer, quote_untrusted
from distrust.option_values import EXAMPLES, as_names
from distrust.ranks import Ranks, gather_json
from distrust.remote_copies import fetch_checkpoint
from distrust.run_record import RunRecord
from distrust.training import imported
from distrust.training.events import Reason
from distrust.training.handover import load_on_all
from distrust.training.memory_guard import GIB
from distrust.training.progress import BestTracker


def require_startable(config: TrainConfig, manager: CheckpointManager) -> None:
    """Refuse to begin next to checkpoints in an older format, in the wrong folder, or of another program."""
    scan = manager.scan()
    if scan.foreign and scan.all_intact[-1].is_foreign:
        require_converted(scan.all_intact[-1])
    out = config.run_directory
    if scan.all_intact or scan.damaged:  # damaged ones are reported when the newest is loaded
        return
    if hint := foreign.import_hint(out):
        raise ConfigError(f"--out {out}: has no checkpoints of this trainer{hint}; or give another --out")
    misplaced = [path for path, *_ in list_names(out) if not _is_empty_folder(path)]
    if not misplaced:
        return
    advice = f"resume from it by `distrust convert {out} --to RUN`, or give another --out"
    files = CheckpointManager(out).scan().files
    if files and (program := RunRecord.from_header(files[-1].header).trained_by):
        advice = f"it is resumed by the script that trains with {quote_untrusted(program)}"
    if out.name == RUN_SUBDIRECTORY:
        advice = f"give --out {out.parent}"
    raise ConfigError(
        f"--out {out}: contains {misplaced[-1].name}, but a run keeps its checkpoints in "
        f"{RUN_SUBDIRECTORY}/; {advice}"
    )


def _is_empty_folder(path: Path) -> bool:
    try:
        return not os.listdir(path)
    except OSError:
        return False


def recorded_run(config: TrainConfig, manager: CheckpointManager) -> RunRecord | None:
    """What the checkpoint that a run resumes from records; None for a new run. Only the header is read."""
    files = manager.scan().files
    if files:
        file = files[-1]
    elif config.from_step is not None:  # a new branch
        source, branching_point = _branch_source(config, config.from_step)
        file = source.inspect(branching_point)
    else:
        return None
    record = RunRecord.from_header(file.header)
    if not record.imported_from:
        return record
    return replace(record, config=imported.complete_config(record.config, config))


def _branch_source(config: TrainConfig, step: int) -> tuple[CheckpointManager, int | Path]:
    """The checkpoints of the run that a branch begins from, which are only read; and which one of them."""
    if is_url(config.out):
        copy, _ = fetch_checkpoint(parse(config.out, "--out"), step=step)
        return CheckpointManager(copy.parent), copy  # not the step: older copies may be of another state
    return CheckpointManager(Path(config.out) / RUN_SUBDIRECTORY), step


def find_finished_run(
    config: TrainConfig, manager: CheckpointManager
) -> tuple[CheckpointFile, Reason] | None:
    """The final checkpoint of a run that is complete, and why; decided without loading a model.

    ``config`` has the options of the run: see :func:`resume.merge_saved_options`.
    """
    files = manager.scan().files
    if not files or config.from_step is not None:  # a branch may continue a finished run
        return None
    newest = files[-1]
    record = RunRecord.from_header(newest.header)
    if record.imported_from:
        return None
    require_not_made(config, config.max_steps, step=newest.step)
    run = record.settings
    if run.get("chat_template") != config.chat_template:
        return None
    names, recorded = (config.model, *as_names(config.data)), (run.get("model"), *as_names(run.get("data")))
    with contextlib.suppress(ConfigError):  # there, names do not depend on the working directory
        written = from_toml(config.run_directory / RUN_CONFIG)
        recorded = (written.model, *as_names(written.data))
    if [*map(os.path.abspath, names)] != [*map(os.path.abspath, map(str, recorded))]:
        return None  # they may be the same under other names; only loading them tells
    if config.data == EXAMPLES:
        return None  # the name does not identify the data
    # If not given, max_steps is what the epochs took, unless the number of epochs has changed.
    max_steps = config.max_steps or (run.get("max_steps") if run.get("epochs") == config.epochs else None)
    if newest.kind != "final" or max_steps is None:
        return None
    evaluations = BestTracker(config.metric, config.metric_mode).restore(record.evaluations)
    early = newest.step < max_steps
    if early and (
        not evaluations.out_of_patience(config.early_stopping_patience)
        or as_names(run.get("eval_data") or ()) != as_names(config.eval_data or ())
        or run.get("eval_split") != config.eval_split
    ):
        return None
    try:
        manager.validate(newest.path)
    except CorruptCheckpoint:
        return None  # the run resumes from the checkpoint before it
    return newest, "early_stopping" if early else "finished"


def require_not_made(config: TrainConfig, max_steps: int | None, *, step: int) -> None:
    """Refuse to end a run, which has made ``step`` steps, at an earlier one."""
    if max_steps is not None and max_steps < step:
        option, advice = f"--max-steps {max_steps}", f"give {step} or more"
        if config.max_steps is None:
            option, advice = f"--epochs {config.epochs}, which is {max_steps} steps", "give more"
        raise ConfigError(f"{option}: the run is at step {step} already; {advice}")


def load_device(config: TrainConfig, engine: Engine, nbytes: int) -> str | None:
    """The device that a state of this size is loaded to; None for the host."""
    limit, memory = config.max_device_memory, engine.device_memory()
    if limit is not None and memory is not None and memory.reserved + 2 * nbytes > limit * GIB:
        return None  # twice: the engine will allocate its moments
    return engine.device_for(nbytes)


def require_newest_on_leader(ranks: Ranks, manager: CheckpointManager) -> None:
    """Refuse to begin where another machine, with a disk of its own, has gone further than the leader."""
    if ranks.count == 1:
        return
    newest = gather_json(ranks, max(manager.list_checkpoints(), default=0))
    if (most := max(newest)) > newest[0]:
        raise RanksDiffer(
            f"{manager.directory}: {ranks.describe(newest.index(most))} has the checkpoint of step {most}, "
            f"which the leader, {ranks.describe(0)}, does not see: give all machines one folder, or copy it"
        )


def load_step(
    config: TrainConfig, manager: CheckpointManager, engine: Engine, ranks: Ranks, step: int
) -> Checkpoint:
    """The verified checkpoint of a step, on every rank."""

    def load() -> Checkpoint:
        return manager.load(step, **_loading(config, engine, ranks, manager.inspect(step).bytes))

    return cast(Checkpoint, load_on_all(ranks, engine, load))


def load_resume_point(
    config: TrainConfig, manager: CheckpointManager, engine: Engine, ranks: Ranks
) -> tuple[Checkpoint | None, CheckpointFile | None]:
    """The verified checkpoint that a run resumes from, on every rank, and its file, on the leader."""
    file: CheckpointFile | None = None

    def load() -> Checkpoint | None:
        nonlocal file
        checkpoint, file = _find_resume_point(config, manager, engine, ranks) or (None, None)
        return checkpoint

    return load_on_all(ranks, engine, load), file


def _loading(config: TrainConfig, engine: Engine, ranks: Ranks, nbytes: int) -> dict[str, Any]:
    """How to load: to other ranks a checkpoint goes through the host, from the file if it is divided."""
    if ranks.count == 1:
        return {"framework": engine.framework, "device": load_device(config, engine, nbytes)}
    return {"framework": engine.framework, "mmap": engine.peers is not None}


def _find_resume_point(
    config: TrainConfig, manager: CheckpointManager, engine: Engine, ranks: Ranks
) -> tuple[Checkpoint, CheckpointFile] | None:
    """The verified checkpoint that a run resumes from, and its file; None for a new run.

    A branch that has checkpoints of its own resumes from them, so repeating its command continues it. If
    there are checkpoints but none is intact, it raises: a new run would hide the damage.
    """
    step, scan, plain = config.from_step, manager.scan(), {"framework": engine.framework}
    if scan.files or scan.damaged:
        largest = max((file.bytes for file in scan.files), default=0)
        options = plain if scan.foreign else _loading(config, engine, ranks, largest)
        if step is None or config.branch is not None or _already_branched(step, scan):
            checkpoint = manager.load_latest(**options)  # falls back if damaged
        else:
            steps = manager.list_checkpoints()
            if step in steps and step != steps[-1]:
                raise ConfigError(
                    f"--from-step {step}: {config.out} already continues to step {steps[-1]}, and a folder "
                    "holds only one timeline; add --branch NEW_FOLDER"
                )
            checkpoint = manager.load(step, **options)
        return checkpoint, manager.inspect(checkpoint.step)
    if step is None:
        return None
    source, branching_point = _branch_source(config, step)
    file = source.inspect(branching_point)
    options = plain if file.is_foreign else _loading(config, engine, ranks, file.bytes)
    return source.load(branching_point, **options), file


def _already_branched(step: int, scan: Scan) -> bool:
    """Whether the same command has begun from that step before: then it continues its own checkpoints."""
    newest = scan.files[-1] if scan.files else None
    return newest is not None and RunRecord.from_header(newest.header).settings.get("from_step") == step
