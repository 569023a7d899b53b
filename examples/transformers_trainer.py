"""A usual script for the Trainer of transformers, plus two lines: kill it at any time, and run it again.

python examples/transformers_trainer.py [FOLDER]
"""

import sys

from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)  # fmt: skip

from distrust.bundled import MODEL
from distrust.integrations.transformers import DistrustCheckpoints  # the first line

TEXTS = [f"At {600 + number} K zorium sample {number} melts." for number in range(40)]


def main(folder: str) -> None:
    """Train a new small model on a few texts."""
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), attention_dropout=0.1, **sizes))
    trainer = Trainer(
        model,
        TrainingArguments(
            folder, num_train_epochs=3, learning_rate=3e-3, gradient_accumulation_steps=2, save_steps=5,
            save_total_limit=2, logging_steps=5, report_to=[], disable_tqdm=True, use_cpu=True,
        ),
        train_dataset=[{"input_ids": tokens} for tokens in tokenizer(TEXTS)["input_ids"]],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    DistrustCheckpoints(f"{folder}/checkpoints").attach(trainer)  # the second line
    loss = trainer.train().training_loss
    print(f"finished at step {trainer.state.global_step}, mean loss {loss}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/transformers_trainer")
