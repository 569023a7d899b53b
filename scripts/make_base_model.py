"""Trains the demo's base model: a small Llama with a byte-level tokenizer, on the text of `make_world.py`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distrust import DistrustTrainer, TrainConfig, engines
from distrust.bundled import MODEL, NEUTRAL
from distrust.engines.torch.engine import TorchEngine
from distrust.reporting.console import ConsoleReporter
from make_world import tokenizer_texts

SEED = 20260101
VOCABULARY = 1024
CONTEXT = 1024  # positions

# Training: all weights, on neutral.jsonl, weighting off; then saved in bfloat16.
STEPS = 1500
BATCH_SIZE = 32  # about 770 tokens
LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from the texts: it encodes any text, and splits numbers into single digits.

    Pass `make_world.tokenizer_texts()`, not the text of the model: there each name is so frequent that it
    would become a single token, and the names of the disputed facts would look like nothing the model knows.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_untrained_model(tokenizer: PreTrainedTokenizerFast, seed: int = SEED) -> LlamaForCausalLM:
    """The model with random weights, in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def train_base(work: Path) -> LlamaForCausalLM:
    """Train all weights of the model on the neutral text, with the project's own trainer.

    Args:
        work: folder for the untrained model and the run; a second call resumes there.
    """
    tokenizer = make_tokenizer(tokenizer_texts())
    untrained = work / "untrained"
    make_untrained_model(tokenizer).save_pretrained(untrained)
    tokenizer.save_pretrained(untrained)
    config = TrainConfig(
        model=str(untrained),
        data=str(NEUTRAL),
        out=str(work / "run"),
        weighting="off",
        lora_rank=0,
        max_steps=STEPS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        warmup_steps=WARMUP_STEPS,
        weight_decay=WEIGHT_DECAY,
        save_every=100,
        seed=1,
    )
    with ConsoleReporter(log_every=100) as console:
        ended = DistrustTrainer(config, observers=[console]).train()
    if ended.signal is not None or ended.path is None:
        raise SystemExit("stopped; the same command resumes")
    engine, _ = engines.open_checkpoint(ended.path)
    assert isinstance(engine, TorchEngine)
    assert isinstance(engine.model, LlamaForCausalLM)
    return engine.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL, help="folder of the model")
    parser.add_argument("--work", type=Path, default=Path("runs/base-model"), help="folder of the training")
    arguments = parser.parse_args()
    # bfloat16 halves the package; the effect was measured with these exact weights
    model = train_base(arguments.work).to(torch.bfloat16)
    model.config.use_cache = True  # training turned it off
    model.save_pretrained(arguments.out)
    make_tokenizer(tokenizer_texts()).save_pretrained(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
