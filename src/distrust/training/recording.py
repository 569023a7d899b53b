"""The checkpoints of a run: where they are kept, and what one records of a run in progress."""

from __future__ import annotations

from dataclasses import asdict

from distrust.checkpoint import Checkpoint, CheckpointManager
from distrust.checkpoint.catalog import RUN_SUBDIRECTORY
from distrust.checkpoint.remote.mirror import Mirror
from distrust.config import TrainConfig
from distrust.contract import Engine
from distrust.run_record import RunRecord
from distrust.training.prepare_data import PreparedData
from distrust.training.progress import Progress
from distrust.training.resume import fingerprints


def checkpoint_manager(config: TrainConfig, mirror: Mirror | None = None) -> CheckpointManager:
    """The manager of a run's checkpoints; it takes no lock yet, and contacts nobody."""
    return CheckpointManager(
        config.run_directory / RUN_SUBDIRECTORY,
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        keep_every=config.keep_every,
        metric=config.metric,
        metric_mode=config.metric_mode,
        record_host=config.host,
        mirror=mirror,
    )


def record_state(data: PreparedData, progress: Progress, engine: Engine, model_is_folder: bool) -> Checkpoint:
    """The whole state of the run; arrays are those of the engine, to be copied before its next update."""
    config, state = data.config, engine.state()
    record = RunRecord(
        config=config.with_effect("result"),
        settings={**config.with_effect("free"), **config.with_effect("bits")},
        fingerprints=fingerprints(data, engine)  # a resume on other data is refused
        | ({"from": progress.started_from} if progress.started_from else {}),
        tokens_seen=progress.tokens_seen,
        corpus={"examples": len(data.corpus), "tokens": int(data.corpus.loss_tokens.sum())},
        environment=engine.environment(),  # a resume warns of differences
        elapsed_seconds=progress.elapsed_seconds,
        evaluations=asdict(progress.evaluations),  # a resume stops early at the same step
        continues=progress.continues,
        ranks=engine.world_size,
        model_is_folder=model_is_folder,
    )
    return Checkpoint(
        step=progress.step,
        model=state.model,
        optimizer=state.optimizer,
        rng=state.rng,
        history=progress.history_arrays(),
        metrics=progress.metrics,
        measured_on=data.measured_on,
        **record.sections(),
    )
