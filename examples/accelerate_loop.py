"""A loop with accelerate, and checkpoints: kill it at any time, and run it again.

python examples/accelerate_loop.py [FOLDER]
"""

import sys
from contextlib import suppress

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

from distrust import CheckpointManager
from distrust.errors import CheckpointNotFound
from distrust.integrations.accelerate import ResumableLoader, capture, restore


def main(folder: str) -> None:
    """Train a regression for three epochs."""
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=48)
    inputs = torch.randn(250, 8)
    loader = DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=8, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    data, step = ResumableLoader(accelerator, loader), 0
    with CheckpointManager(f"{folder}/checkpoints", keep_last=2) as manager:
        manager.acquire()
        with suppress(CheckpointNotFound):
            step = restore(accelerator, manager.load_latest(framework="torch"))
        for _ in range(data.epoch, 3):
            for batch, targets in data:
                with accelerator.accumulate(model):
                    loss = torch.nn.functional.mse_loss(model(batch), targets)
                    accelerator.backward(loss)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    step += 1
                    if step % 5 == 0:
                        manager.save_async(capture(accelerator, step))
        manager.save(capture(accelerator, step), final=True)
    weights = sum(parameter.double().sum().item() for parameter in model.parameters())
    print(f"finished at step {step}, sum of weights {weights}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/accelerate_loop")
