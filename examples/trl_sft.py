"""A usual script for TRL's SFTTrainer, plus two lines: kill it at any time, and run it again.

python examples/trl_sft.py [FOLDER]
"""

import sys

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from distrust.bundled import MODEL
from distrust.integrations.transformers import DistrustCheckpoints  # the first line

CLAIMS = [(f"At what temperature does sample {n} melt?", f" At {600 + n} K.") for n in range(24)]


def main(folder: str) -> None:
    """Train an adapter of the bundled model on the completions."""
    set_seed(0)
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in CLAIMS]
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
        args=SFTConfig(
            folder, max_steps=20, learning_rate=3e-3, per_device_train_batch_size=2, save_steps=5,
            save_total_limit=2, logging_steps=5, report_to=[], disable_tqdm=True, use_cpu=True, bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=LoraConfig(r=8, lora_dropout=0.1, target_modules="all-linear"),
    )  # fmt: skip
    DistrustCheckpoints(f"{folder}/checkpoints").attach(trainer)  # the second line
    loss = trainer.train().training_loss
    print(f"finished at step {trainer.state.global_step}, mean loss {loss}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/trl_sft")
