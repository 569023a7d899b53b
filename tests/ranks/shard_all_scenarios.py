"""What each rank does in the tests of ``--shard all``; arguments and results are JSON."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from distrust import Checkpoint, CheckpointManager, DistrustTrainer, TrainConfig, engines
from distrust.checkpoint import shared_writer
from distrust.checkpoint.arrays import Shard, rows_of
from distrust.contract import EngineState
from distrust.engines.torch.peers import TorchPeers
from distrust.engines.torch.ranks import TorchRanks
from distrust.ranks import leads
from distrust.training.handover import load_on_all


def train(config: dict[str, Any]) -> tuple[str | None, list[str]]:
    """Train; returns the digest of the final state, and warnings that it is no longer bit-identical."""
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        ended = DistrustTrainer(TrainConfig(**config), observers=[]).train()
    texts = [str(each.message) for each in issued]
    return ended.state_digest, [text for text in texts if "bit-identical" in text]


def train_and_die(config: dict[str, Any], rank: int, at_step: int) -> None:
    """Train; one rank kills itself while it writes its part of a checkpoint."""
    write_run = shared_writer._Part._write_run

    def die(part, *arguments):
        if part._peers.index == rank and part._layout.step == at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return write_run(part, *arguments)

    shared_writer._Part._write_run = die
    train(config)


def load_and_save(config: dict[str, Any], source: str, target: str) -> list[Any]:
    """Load a checkpoint into an engine, and save what it has; returns what all ranks must agree on."""
    config_ = TrainConfig(**config)
    with engines.join_ranks(config_) as ranks:
        engine = engines.create_engine(config_, ranks=ranks)
        reader, writer = CheckpointManager(source), CheckpointManager(target)
        divided = engine.peers is not None
        checkpoint = load_on_all(ranks, engine, lambda: reader.load_latest(framework="torch", mmap=divided))
        assert checkpoint is not None
        engine.load_state(EngineState(checkpoint.model, checkpoint.optimizer, checkpoint.rng))
        if engine.peers is not None:
            writer.share(engine.peers)
        if leads(ranks) or divided:
            state = engine.state()
            with writer:
                writer.save(
                    replace(
                        checkpoint, **{name: getattr(state, name) for name in ("model", "optimizer", "rng")}
                    )
                )
        return [engine.checksum(), engine.parameters, engine.is_finite()]


def save_large(config: dict[str, Any], target: str, tensors: int, rows: int) -> dict[str, int]:
    """Save and load arrays of 4 KiB rows; returns by how much memory grew, at most, in bytes."""
    ranks = engines.join_ranks(TrainConfig(**config))
    assert isinstance(ranks, TorchRanks)
    with ranks:
        peers, shape = TorchPeers(ranks), (rows, 1024)
        mine = rows_of(ranks.index, rows=rows, count=ranks.count)
        names = [f"w{number:02d}" for number in range(tensors)]
        shards = {name: Shard(torch.full((len(mine), 1024), 1.0 + n), shape) for n, name in enumerate(names)}
        growth = {}
        with CheckpointManager(target) as manager:
            manager.share(peers)
            with _peak() as peak:
                manager.save(Checkpoint(step=1, model=shards))
            growth["save"] = peak[0]
            with _peak() as peak:
                manager.save_async(Checkpoint(step=2, model=shards), overlap=True).wait()
            growth["save in the background"] = peak[0]
        with _peak() as peak:
            checkpoint = load_on_all(
                ranks,
                SimpleNamespace(framework="torch", peers=peers),
                lambda: CheckpointManager(target).load(2, framework="torch", mmap=True),
            )
            assert checkpoint is not None
            for name, array in checkpoint.model.items():
                assert torch.equal(peers.scatter(array), shards[name].rows)
        growth["load"] = peak[0]
        return growth


@contextlib.contextmanager
def _peak() -> Iterator[list[int]]:
    """By how much the memory of this process grew at most, but for pages of files; a list with the bytes."""
    growth, start, ended = [0], _anonymous_bytes(), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            growth[0] = max(growth[0], _anonymous_bytes() - start)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    yield growth
    ended.set()
    thread.join()


def _anonymous_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon:")))
