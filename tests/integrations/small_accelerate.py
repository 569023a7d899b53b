"""A user's loop with accelerate, and a run of it that can die after any micro-batch."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the first optimizer imports it, which takes longer than a run
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from distrust import CheckpointManager
from distrust.errors import CheckpointNotFound
from distrust.integrations.accelerate import ResumableLoader, capture, restore

EPOCHS = 3


class Sums(Dataset[Any]):
    """Vectors and their sums; the number of examples is no multiple of the examples of a step."""

    def __init__(self, length: int = 22) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        vector = torch.cos(torch.arange(4.0) * (index + 1))
        return vector, vector.sum(dim=0, keepdim=True)


class StreamedSums(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from map(Sums().__getitem__, range(22))


class Counter:
    """A registered object of the user."""

    def __init__(self) -> None:
        self.examples = 0

    def state_dict(self) -> dict[str, int]:
        return {"examples": self.examples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.examples = state["examples"]


def prepare(
    *,
    accumulation: int = 2,
    width: int = 8,
    dtype: torch.dtype = torch.float32,
    length: int = 22,
    batch_size: int | None = 2,
    seed: int = 3,
    weight_decay: float = 0.01,
    seedable: bool = False,
    stateful: bool = False,
    workers: int = 0,
    streamed: bool = False,
    generator: torch.Generator | None = None,
    sampler_generator: torch.Generator | None = None,
) -> tuple[Any, ...]:
    """What a script makes before it trains; one layer is frozen."""
    set_seed(seed)
    loading = DataLoaderConfiguration(use_seedable_sampler=seedable, use_stateful_dataloader=stateful)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, dataloader_config=loading)
    layers = [torch.nn.Linear(4, width), torch.nn.BatchNorm1d(width), torch.nn.Dropout(0.3)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(width, 4), torch.nn.Linear(4, 1)).to(dtype)
    model[3].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=200)
    data: Any = StreamedSums() if streamed else Sums(length)
    order: dict[str, Any] = {"shuffle": not streamed, "generator": generator}
    if sampler_generator is not None:
        order = {"sampler": RandomSampler(data, generator=sampler_generator)}
    loader = DataLoader(data, batch_size, num_workers=workers, **order)
    eval_loader = DataLoader(Sums(), 4, shuffle=True)
    prepared = accelerator.prepare(model, optimizer, scheduler, loader, eval_loader)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    return accelerator, *prepared, counter


def run(folder: str, *, batches: int | None = None, every: int = 2, **options: Any) -> None:
    """Train; die after a number of micro-batches of this process; write the end to ``result.json``."""
    accelerator, model, optimizer, scheduler, loader, eval_loader, counter = prepare(**options)
    data = ResumableLoader(accelerator, loader)
    path = Path(folder) / "losses.json"
    losses: dict[str, float] = {}
    step = 0
    with CheckpointManager(Path(folder) / "checkpoints", keep_last=2) as manager:
        try:
            step = restore(accelerator, manager.load_latest(framework="torch"))
        except CheckpointNotFound:
            pass
        else:
            losses = json.loads(path.read_text())
        for epoch in range(data.epoch, EPOCHS):
            for inputs, targets in data:
                with accelerator.accumulate(model):
                    loss = (model(inputs) - targets).square().mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                counter.examples += len(inputs)
                losses[f"{epoch}, {data.batch}"] = loss.item()
                path.write_text(json.dumps(losses))
                if accelerator.sync_gradients:
                    step += 1
                    if step % every == 0:
                        manager.save_async(capture(accelerator, step))
                if batches is not None and (batches := batches - 1) < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            model.eval()
            losses[f"eval {epoch}"] = sum(model(inputs).sum().item() for inputs, _ in eval_loader)
            path.write_text(json.dumps(losses))  # another run may begin with the final checkpoint
            model.train()
        manager.save(capture(accelerator, step), final=True)
    numbers = [random.random(), np.random.rand(), torch.rand(1).item()]
    digest = next(file.state_digest for file in manager.scan().files if file.kind == "final")
    result = {"step": step, "digest": digest, "numbers": numbers, "losses": losses, "seen": counter.examples}
    (Path(folder) / "result.json").write_text(json.dumps(result))
