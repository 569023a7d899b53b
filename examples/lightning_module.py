"""Lightning's Trainer with safe, exact checkpoints: kill it at any time, and run it again.

python examples/lightning_module.py [FOLDER]
"""

import hashlib
import sys

import lightning
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from distrust.integrations.lightning import DistrustCheckpointIO, DistrustModelCheckpoint, RandomState


class Regression(lightning.LightningModule):  # type: ignore[misc]
    """A small net with dropout; Lightning alone would not save the numbers that dropout draws."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Dropout(0.2), torch.nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor], number: int) -> torch.Tensor:  # noqa: ARG002, D102
        rows, targets = batch
        loss: torch.Tensor = (self.net(rows) - targets).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:  # noqa: D102
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


lightning.seed_everything(0)
rows = torch.randn(30, 8)
data = torch.utils.data.TensorDataset(rows, rows.sum(dim=1, keepdim=True))
model = Regression()
trainer = lightning.Trainer(
    max_steps=40,
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    plugins=[DistrustCheckpointIO()],
    callbacks=[
        RandomState(),
        # 15 steps are an epoch. Lightning cannot resume exactly from a save on an epoch's last batch.
        DistrustModelCheckpoint(
            sys.argv[1] if len(sys.argv) > 1 else "runs/lightning", every_n_train_steps=4
        ),
    ],
)
trainer.fit(model, StatefulDataLoader(data, batch_size=2, shuffle=True), ckpt_path="last")
weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
print(f"finished at step {trainer.global_step}: weights {hashlib.sha256(weights).hexdigest()}")
