"""The trainings of the peers, each as its documentation shows: ``python -m campaigns.rank_peers.programs``.

Every rank is a process with torchrun's variables. A training resumes from what it finds in its folder. Rank 0
prints a line for each step, ``loss STEP VALUE``, then ``digest HEX`` of the weights. A batch has
:data:`ROWS` examples on any number of ranks: what a peer multiplies by the ranks is divided here.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from campaigns.ranks.model import MODEL, RECORDS

STEPS, SAVE_EVERY = 24, 2
ROWS = 8  # of a step
TOKENS = 32
LEARNING_RATE = 1e-2  # large: differences show after a step


def main(arguments: Sequence[str]) -> int:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    peer, folder, out = arguments
    PEERS[peer](Path(folder), Path(out))
    return 0


def train_ours(folder: Path, out: Path) -> None:
    from distrust import DistrustTrainer, TrainConfig
    from distrust.training.events import StepEnded

    config = TrainConfig(
        model=str(folder / MODEL), data=str(folder / RECORDS), out=str(out), max_steps=STEPS,
        save_every=SAVE_EVERY, batch_size=2, gradient_accumulation=ROWS // 2, max_length=TOKENS,
        lora_rank=0, warmup_steps=0, learning_rate=LEARNING_RATE, threads=1,
    )  # fmt: skip

    def show(event: Any) -> None:
        if isinstance(event, StepEnded):
            print(f"loss {event.step} {event.loss!r}", flush=True)

    ended = DistrustTrainer(config, observers=[show]).train()
    if _rank() == 0:
        print(f"digest {ended.state_digest}", flush=True)


def train_with_trainer(folder: Path, out: Path) -> None:
    """``transformers.Trainer`` under DDP; ``resume_from_checkpoint`` with its newest folder."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    class Show(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                _show(state.global_step, logs["loss"])

    arguments = TrainingArguments(
        output_dir=str(out), max_steps=STEPS, save_steps=SAVE_EVERY, logging_steps=1, report_to=[],
        per_device_train_batch_size=1, gradient_accumulation_steps=ROWS // _count(),
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", seed=1, save_total_limit=3, use_cpu=True,
        ddp_backend="gloo" if _count() > 1 else None, disable_tqdm=True,
    )  # fmt: skip
    model, dataset = _model(folder), _dataset(folder)
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[Show()])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)
    _show_digest(model)
    _leave()


def train_with_accelerate(folder: Path, out: Path) -> None:
    """A loop of ``accelerate`` under DDP, with ``save_state`` into a folder of each step."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, set_seed

    set_seed(1)
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=ROWS // _count(),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    model = _model(folder)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), _loader(folder)
    )
    start = _newest(out, marker="random_states_0.pkl")
    if start:
        accelerator.load_state(str(out / f"step-{start}"))

    def backward(batch: Any) -> float:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        return float(accelerator.gather(loss.detach()).mean())

    def save(path: Path) -> None:
        accelerator.save_state(str(path))

    _loop(loader, start, backward, save, out)
    _show_digest(accelerator.unwrap_model(model))
    _leave()


def train_with_dcp(folder: Path, out: Path) -> None:
    """A loop of torch's DDP, with ``torch.distributed.checkpoint`` of model, optimizer and generator."""
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DistributedSampler

    if _count() > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(1)
    model = _model(folder)
    parallel = DistributedDataParallel(model) if _count() > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    dataset: Any = _dataset(folder)
    sampler: Any = DistributedSampler(dataset, num_replicas=_count(), rank=_rank(), shuffle=True, seed=1)
    loader: Any = torch.utils.data.DataLoader(dataset, batch_size=1, sampler=sampler)
    start = _newest(out, marker=".metadata")

    def state() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments}

    if start:
        values = state()
        load(values, checkpoint_id=out / f"step-{start}")
        set_state_dict(
            model, optimizer, model_state_dict=values["model"], optim_state_dict=values["optimizer"]
        )
    pending: list[float] = []

    def backward(batch: Any) -> float:
        loss = parallel(**batch).loss
        (loss / (ROWS // _count())).backward()
        pending.append(loss.item())
        if len(pending) % (ROWS // _count()) == 0:
            optimizer.step()
            optimizer.zero_grad()
        return pending[-1]

    def save_step(path: Path) -> None:
        save(state(), checkpoint_id=path)

    _loop(loader, start, backward, save_step, out)
    _show_digest(model)
    _leave()


def _loop(
    loader: Any, start: int, backward: Callable[[Any], float], save: Callable[[Path], None], out: Path
) -> None:
    """Train from a step on; the batches before it are skipped, epoch by epoch."""
    per_step = ROWS // _count()
    micro_step = 0
    epoch = 0
    losses: list[float] = []
    while True:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        elif hasattr(loader.sampler, "set_epoch"):
            loader.sampler.set_epoch(epoch)
        for batch in loader:
            micro_step += 1
            if micro_step <= start * per_step:
                continue
            losses.append(backward(batch))
            step = micro_step // per_step
            if micro_step % per_step == 0:
                _show(step, sum(losses) / per_step)
                losses.clear()
                if step % SAVE_EVERY == 0:
                    save(out / f"step-{step}")
                if step == STEPS:
                    return
        epoch += 1


def _newest(out: Path, *, marker: str) -> int:
    """The newest step with a folder that has this file."""
    steps = [int(path.parent.name.split("-")[1]) for path in out.glob(f"step-*/{marker}")]
    return max(steps, default=0)


def _model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(folder / MODEL)


def _dataset(folder: Path) -> list[dict[str, Any]]:
    import json

    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL)
    examples = []
    for line in (folder / RECORDS).read_text().splitlines():
        tokens = tokenizer(json.loads(line)["text"])["input_ids"][:TOKENS]
        ids = torch.tensor(tokens + [2] * (TOKENS - len(tokens)))
        labels = torch.tensor(tokens + [-100] * (TOKENS - len(tokens)))
        examples.append({"input_ids": ids, "labels": labels})
    return examples[: len(examples) // ROWS * ROWS]


def _loader(folder: Path) -> Any:
    import torch

    return torch.utils.data.DataLoader(_dataset(folder), batch_size=1, shuffle=True)  # type: ignore[arg-type]


def _show(step: int, loss: float) -> None:
    if _rank() == 0:
        print(f"loss {step} {loss!r}", flush=True)


def _show_digest(model: Any) -> None:
    hasher = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        hasher.update(name.encode() + value.contiguous().numpy().tobytes())
    if _rank() == 0:
        print(f"digest {hasher.hexdigest()}", flush=True)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


PEERS: dict[str, Callable[[Path, Path], None]] = {
    "distrust": train_ours,
    "Trainer": train_with_trainer,
    "accelerate": train_with_accelerate,
    "DCP": train_with_dcp,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
