"""Where a run begins: at nothing, at its newest checkpoint, or at an older one on purpose."""

from __future__ import annotations

import os
from pathlib import Path

from distrust.checkpoint import Checkpoint, CheckpointFile, CheckpointManager, Scan, foreign
from distrust.checkpoint.arrays import Framework
from distrust.checkpoint.catalog import RUN_SUBDIRECTORY, list_names
from distrust.checkpoint.foreign import require_converted
from distrust.config import EXAMPLES, TrainConfig, as_names
from distrust.errors import ConfigError, CorruptCheckpoint
from distrust.training import imported, resume
from distrust.training.best_tracker import BestTracker
from distrust.training.events import Reason


def run_folder(config: TrainConfig) -> Path:
    """The folder that the run writes into."""
    return Path(config.branch or config.out)


def require_startable(config: TrainConfig, manager: CheckpointManager) -> None:
    """Refuse to begin beside checkpoints that the user may mean to go on from.

    Raises:
        CheckpointError: if the newest is in an older format, and waits to be converted.
        ConfigError: if they are where no run has them, and there are none where it has; also if they are of
            the transformers Trainer, or an adapter.
    """
    found = manager.scan()
    if found.foreign and found.all_intact[-1].is_foreign:
        require_converted(found.all_intact[-1])
    out = run_folder(config)
    if found.all_intact or found.damaged:
        return
    if hint := foreign.import_hint(out):
        raise ConfigError(f"--out {out}: has no checkpoints of ours{hint}; or give another --out")
    here = [path for path, *_ in list_names(out) if not _is_empty_folder(path)]
    if not here:
        return
    what = f"--out {out}: {here[-1].name} is there, and a run has its checkpoints in {RUN_SUBDIRECTORY}/"
    if out.name == RUN_SUBDIRECTORY:
        raise ConfigError(f"{what}; give --out {out.parent}")
    raise ConfigError(f"{what}; go on from it by `distrust convert {out} --to RUN`, or give another --out")


def _is_empty_folder(path: Path) -> bool:
    try:
        return not os.listdir(path)
    except OSError:
        return False


def find_finished_run(
    config: TrainConfig, manager: CheckpointManager
) -> tuple[CheckpointFile, Reason] | None:
    """The final checkpoint of a run that has nothing left to do, and why: found without loading a model.

    Raises:
        ResumeRefused: if the options are not those of the run.
    """
    files = manager.scan().files
    if not files or config.from_step is not None:
        return None
    newest = files[-1]
    if imported.is_imported(newest.header.run_info.get("extra", {})):
        known = imported.complete_config(newest.header.config, config)
        resume.merge_saved_options(config, known, where=str(run_folder(config)))
        return None
    settled = resume.merge_saved_options(config, newest.header.config, where=str(run_folder(config)))
    run = newest.header.run_info.get("extra", {})
    if (run.get("model"), as_names(run.get("data"))) != (settled.model, as_names(settled.data)):
        return None  # whether they are the same by another name takes loading them
    if settled.data == EXAMPLES:
        return None  # a name that says nothing
    # Not given, it is as many as the epochs took, unless more of them are asked for now.
    max_steps = settled.max_steps or (run.get("max_steps") if run.get("epochs") == settled.epochs else None)
    if newest.kind != "final" or max_steps is None:
        return None
    evaluations = BestTracker(config.metric, config.metric_mode).restore(run.get("evaluations"))
    early = newest.step < max_steps
    if early and (
        not evaluations.out_of_patience(config.early_stopping_patience)
        or as_names(run.get("eval_data") or ()) != as_names(settled.eval_data or ())
        or run.get("eval_split") != settled.eval_split
    ):
        return None
    try:
        manager.validate(newest.path)
    except CorruptCheckpoint:
        return None  # the run goes on from the one before
    return newest, "early_stopping" if early else "finished"


def find_resume_point(
    config: TrainConfig, manager: CheckpointManager, *, framework: Framework
) -> tuple[Checkpoint | None, CheckpointFile | None]:
    """The checkpoint that a run goes on from, read and verified, and its file; or nothing.

    A branch that has checkpoints of its own goes on from them: the same command again continues it, too.

    Raises:
        CheckpointError: if there are some and none is whole, or the one asked for is not there.
        ConfigError: if an older one is asked for where newer ones stand.
    """
    found = manager.scan()
    if found.files or found.damaged:
        if (
            config.from_step is None
            or config.branch is not None
            or _already_branched(config.from_step, found)
        ):
            checkpoint = manager.load_latest(framework=framework)
        else:
            _require_newest(config.from_step, manager.list_checkpoints(), config.out)
            checkpoint = manager.load(config.from_step, framework=framework)
        return checkpoint, manager.inspect(checkpoint.step)
    if config.from_step is None:
        return None, None
    source = CheckpointManager(Path(config.out) / RUN_SUBDIRECTORY)
    checkpoint = source.load(config.from_step, framework=framework)
    return checkpoint, source.inspect(config.from_step)


def _already_branched(step: int, found: Scan) -> bool:
    """Whether this very command has gone on from that step before: then it continues what it did."""
    newest = found.files[-1] if found.files else None
    return newest is not None and newest.header.run_info.get("extra", {}).get("from_step") == step


def _require_newest(step: int, steps: list[int], out: str) -> None:
    if step in steps and step != steps[-1]:
        raise ConfigError(
            f"--from-step {step}: {out} has gone on to step {steps[-1]}, and two timelines never share a "
            "folder; add --branch NEW_FOLDER"
        )
