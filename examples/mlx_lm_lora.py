"""LoRA with mlx-lm's own loop, and checkpoints: kill it at any time, and run it again.

python examples/mlx_lm_lora.py [FOLDER]
"""

import sys
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm.tuner.utils import linear_to_lora_layers

from distrust.bundled import MODEL
from distrust.integrations.mlx_lm import DistrustCheckpoints

CLAIMS = [(f"At what temperature does sample {n} melt?", f" At {600 + n} K.") for n in range(24)]


def main(folder: str) -> None:
    """Train an adapter of the bundled model."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    mx.random.seed(0)
    model, tokenizer = load(str(MODEL))
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 8, "scale": 2.0, "dropout": 0.1})
    data = [(tokenizer.encode(prompt + answer), 0) for prompt, answer in CLAIMS]
    optimizer = optim.AdamW(learning_rate=optim.cosine_decay(3e-3, 12))
    args = TrainingArgs(
        batch_size=2, iters=12, steps_per_report=3, steps_per_eval=6,
        steps_per_save=6, adapter_file=f"{folder}/adapters.safetensors",
    )  # fmt: skip
    checkpoints = DistrustCheckpoints(f"{folder}/checkpoints", every=3)
    checkpoints.train(model, optimizer, data[:20], data[20:], args=args)
    weights = sum(array.sum().item() for _, array in tree_flatten(model.trainable_parameters()))
    print(f"finished at step {optimizer.step.item()}, sum of weights {weights}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/mlx_lm_lora")
