"""Runs of Lightning's Trainer that kill themselves: a program for forks of a process that has imported it.

Arguments: the folder, and the arguments of :func:`train` as JSON. A process appends the
batches that it trains to ``batches.jsonl``; a run that ends writes ``end.json``.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import lightning
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint.disk import Disk
from distrust.integrations.lightning import DistrustCheckpointIO, DistrustModelCheckpoint, RandomState
from distrust.integrations.random import generators

PROGRAM = "tests.integrations.lightning_runs:main"
IMPORTS = ["tests.integrations.lightning_runs", "tests.without_fsync"]
RECORDS, BATCH = 22, 2
BATCHES = RECORDS // BATCH  # of an epoch


@dataclass(frozen=True, kw_only=True)
class Run:
    loader: str = "stateful"  # or plain, or drawing
    workers: int = 0
    accumulate: int = 1
    validate: bool = False
    random_data: bool = False
    streamed: bool = False
    every: int | None = 5  # steps; None saves at each epoch's end
    epochs: int = 3


class Records(Dataset):
    def __init__(self, *, is_random: bool = False) -> None:
        self.rows = torch.randn(RECORDS, 4, generator=torch.Generator().manual_seed(1))
        self.is_random = is_random

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.rows[index] + (torch.randn(4) if self.is_random else 0), index


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        records = Records()
        yield from (records[index] for index in range(RECORDS))


class DrawingLoader(DataLoader):
    """A loader of the user's: it draws its order from the global generator, and can skip."""

    def __init__(self) -> None:
        super().__init__(Records(), batch_size=BATCH)
        self.position = self.skip = 0

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(RECORDS).split(BATCH)  # drawn now, not at the first batch
        begin, self.skip = self.skip, 0
        return self.fetch(order, begin)

    def fetch(self, order: Sequence[torch.Tensor], begin: int) -> Iterator[Any]:
        for number, indices in enumerate(order[begin:], begin + 1):
            self.position = number
            yield self.dataset.rows[indices], indices

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["position"]


class Model(lightning.LightningModule):
    def __init__(self, folder: Path, kill_at: int | None = None, *, settles: bool = False) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        self.folder, self.kill_at, self.settles, self.count = folder, kill_at, settles, 0

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        rows, indices = batch
        self.count += 1
        if self.count == self.kill_at:
            if self.settles:
                self.trainer.strategy.checkpoint_io.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "batches.jsonl").open("a") as file:
            file.write(json.dumps([os.getpid(), *indices.tolist()]) + "\n")
        loss = self.net(rows).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, number: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]


def loader(run: Run) -> Any:
    if run.loader == "drawing":
        return DrawingLoader()
    kind = DataLoader if run.loader == "plain" else StatefulDataLoader
    data = Stream() if run.streamed else Records(is_random=run.random_data)
    return kind(data, batch_size=BATCH, shuffle=None if run.streamed else True, num_workers=run.workers)


def trainer(
    *, folder: Path, callbacks: Sequence[Any] = (), plugins: Sequence[Any] = (), **options: Any
) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[*callbacks],
        plugins=[*plugins],
        **quiet,
        **options,
    )


def train(folder: Path, run: Run, *, kill_at: int | None, settles: bool, is_plain: bool) -> None:
    """``settles``: the last save is durable before the kill; ``is_plain``: without anything of ours."""
    lightning.seed_everything(0, verbose=False)
    model, data = Model(folder, kill_at, settles=settles), loader(run)
    saving = {} if run.every is None else {"every_n_train_steps": run.every}
    parts = {
        "plugins": [DistrustCheckpointIO()],
        "callbacks": [RandomState(), DistrustModelCheckpoint(folder / "checkpoints", **saving)],
    }
    fitting = trainer(
        folder=folder,
        max_epochs=run.epochs,
        accumulate_grad_batches=run.accumulate,
        num_sanity_val_steps=0,
        **({"enable_checkpointing": False} if is_plain else parts),
    )
    validation = DataLoader(Records(), batch_size=4) if run.validate else None
    fitting.fit(model, data, validation, ckpt_path=None if is_plain else "last")
    with CheckpointManager(folder / "end") as manager:
        manager.save(
            Checkpoint(
                step=fitting.global_step,
                model=model.state_dict(),
                optimizer={
                    "optimizer": fitting.optimizers[0].state_dict(),
                    "scheduler": fitting.lr_scheduler_configs[0].scheduler.state_dict(),
                },
                rng=generators(),
            )
        )
        (file,) = manager.scan().all_intact
    end = {"steps": fitting.global_step, "digest": file.header.state_digest}
    (folder / "end.json").write_text(json.dumps(end))


def die_beside_a_write(folder: Path) -> None:
    """Save, save again and have the first file removed; die while the second one is being written."""
    removed = threading.Event()
    io = DistrustCheckpointIO()
    io.save_checkpoint({"state_dict": {"w": torch.ones(3)}, "global_step": 1}, folder / "first.safetensors")
    io.wait()

    def create(self: Disk, path: Path) -> int:
        removed.wait()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    Disk.create = create  # type: ignore[method-assign]
    io.save_checkpoint({"state_dict": {"w": torch.zeros(3)}, "global_step": 2}, folder / "second.safetensors")
    io.remove_checkpoint(folder / "first.safetensors")
    removed.set()
    io.wait()


def main(arguments: Sequence[str]) -> NoReturn:
    warnings.simplefilter("ignore")  # Lightning's: of workers, of loaders that cannot resume, of the folder
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder, order = Path(arguments[0]), json.loads(arguments[1])
    if not order:
        die_beside_a_write(folder)
    else:
        train(folder, Run(**order.pop("run")), **order)
    sys.stdout.flush()
    os._exit(0)  # at once: to take the interpreter of a fork down takes longer than the run


gc.collect()
gc.freeze()  # for the forks: no collection touches, and so copies, the memory of the imports
