"""Checkpoints for a training loop of your own: the trainer is not needed.

python examples/plain_checkpoints.py [STEPS]
"""

import sys
import tempfile

import torch

from distrust import Checkpoint, CheckpointManager, PendingSave
from distrust.errors import CheckpointNotFound


def train(folder: str, steps: int) -> float:
    """A regression that resumes from its newest intact checkpoint; returns the last loss."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    begun, loss = 0, torch.tensor(float("nan"))
    pending: PendingSave | None = None
    with CheckpointManager(folder, keep_last=2) as manager:
        try:
            checkpoint = manager.load_latest(framework="torch")
        except CheckpointNotFound:
            print("a new run")
        else:
            begun = checkpoint.step
            model.load_state_dict(dict(checkpoint.model))
            optimizer.load_state_dict(dict(checkpoint.optimizer))
            torch.set_rng_state(checkpoint.rng["torch"])
            print(f"resuming after step {begun}")

        for step in range(begun + 1, steps + 1):
            batch = torch.randn(32, 8)
            loss = (model(batch) - batch.sum(dim=1, keepdim=True)).square().mean()
            loss.backward()
            if pending is not None:
                pending.wait_copied()  # before the tensors change: they are still being copied
            optimizer.step()
            optimizer.zero_grad()
            if step % 10 == 0 or step == steps:
                checkpoint = Checkpoint(
                    step=step,
                    model=model.state_dict(),
                    optimizer=optimizer.state_dict(),
                    rng={"torch": torch.get_rng_state()},
                    metrics={"loss": loss.item()},
                )
                pending = manager.save_async(checkpoint, overlap=True)
    return loss.item()  # leaving the context has waited for the last save


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parts:
        in_one = train(whole, steps)
        train(parts, steps // 2)
        in_two = train(parts, steps)
        print(f"loss {in_one:.6f} in one go, {in_two:.6f} in two: {'equal' if in_one == in_two else 'NOT'}")
