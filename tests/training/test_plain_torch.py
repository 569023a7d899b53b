"""A run is what transformers, peft and torch compute by themselves, as the documentation defines a step.

Nothing of this package is used for the expected values, but for the order of the examples, which has golden
tests of its own.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from distrust import CheckpointManager, DistrustTrainer, TrainConfig
from distrust.data.sampler import permutation
from distrust.engines import create_engine
from distrust.training.events import StepEnded

# peft asks transformers by a name that transformers has begun to change.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

#: (prompt, completion, w, H): texts where the prompt is empty.
EXAMPLES = [
    ("", "salt", 0.1, 1.5),
    ("", "the ore melts at nine hundred degrees, as three furnaces report", 0.9, 0.3),
    ("where does salt melt?", " at 801", 0.0, 2.4),
    ("", "ore and salt", 0.95, 0.0),
    ("what melts? ", "ore, and also salt, and lead", 0.4, 1.1),
    ("", "lead", 0.7, 0.9),
    ("a long question about the colour of lead, and of its ore? ", "grey", 0.2, 1.9),
    ("", "nine", 0.0, 0.1),
]
STEPS, ACCUMULATION, BATCH = 3, 2, 2
PEAK, MAX_NORM, SEED = 0.02, 0.2, 3
ALPHA, LAMBDA = 2.4, 0.5
BETAS, EPSILON, DECAY = (0.8, 0.95), 1e-3, 0.1
RATES = [PEAK / 2, PEAK, PEAK / 2]  # two steps of warm-up, then half of a cosine's way to 0 at step 4


def run(config: TrainConfig) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[StepEnded]]:
    """Train; returns the initial and the trained weights, and the steps."""
    engine = create_engine(config)
    initial = {name: tensor.clone() for name, tensor in engine.state().model.items()}
    events: list[Any] = []
    examples = [
        {"authority_weight": w, "provenance_entropy": h, "prompt": prompt, "completion": completion}
        if prompt
        else {"authority_weight": w, "provenance_entropy": h, "text": completion}
        for prompt, completion, w, h in EXAMPLES
    ]
    ended = DistrustTrainer(config, engine=engine, examples=examples, observers=[events.append]).train()
    trained = CheckpointManager(ended.path.parent).load(ended.path, framework="torch").model
    return initial, dict(trained), [event for event in events if isinstance(event, StepEnded)]


class PlainTrainer:
    """The definition of docs/training.md and docs/weighting.md with padded batches and torch's optimizer."""

    def __init__(self, folder: Path, *, rank: int, initial: dict[str, torch.Tensor]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
        if rank:
            lora = LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
            self.model = get_peft_model(self.model, lora)
        self.weights = {
            name.replace(".default", ""): weight
            for name, weight in self.model.named_parameters()
            if weight.requires_grad
        }
        assert self.weights.keys() == initial.keys()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(initial[name])
        matrices = [weight for weight in self.weights.values() if weight.ndim >= 2]
        vectors = [weight for weight in self.weights.values() if weight.ndim < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON, weight_decay=DECAY)
        self.ids, self.labels = zip(*map(self.tokens_of, EXAMPLES), strict=True)
        terms = [math.log(1 - w + 1e-8) + h for _, _, w, h in EXAMPLES]
        self.published = [ALPHA * r**2 for r in terms]
        raw = [1 + LAMBDA * ALPHA * max(r, 0) ** 2 for r in terms]
        counts = [self.count(number) for number in range(len(EXAMPLES))]
        mean = sum(u * n for u, n in zip(raw, counts, strict=True)) / sum(counts)
        self.u = [u / mean for u in raw]

    def tokens_of(self, example: tuple[str, str, float, float]) -> tuple[list[int], list[int]]:
        """Token ids, and labels: -100 for the prompt, or for the first token of a text."""
        prompt, completion = (self.tokenizer(text).input_ids for text in example[:2])
        ids = [*prompt, *completion, self.tokenizer.eos_token_id]
        untrained = len(prompt) or 1
        return ids, [-100] * untrained + ids[untrained:]

    def count(self, number: int) -> int:
        """Trained tokens of an example."""
        return sum(label != -100 for label in self.labels[number])

    def cross_entropies(self, examples: list[int]) -> torch.Tensor:
        """The sum over each example's trained tokens, from one padded batch."""
        width = max(len(self.ids[number]) for number in examples)
        gaps = [width - len(self.ids[number]) for number in examples]
        ids = [self.ids[number] + [2] * gap for number, gap in zip(examples, gaps, strict=True)]
        labels = [self.labels[number] + [-100] * gap for number, gap in zip(examples, gaps, strict=True)]
        mask = [[1] * (width - gap) + [0] * gap for gap in gaps]
        logits = self.model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), torch.tensor(labels)[:, 1:], reduction="none"
        )
        return losses.sum(dim=1)

    def step(self, batches: list[list[int]], *, rate: float) -> dict[str, float]:
        """One optimizer step; returns what the trainer logs."""
        numbers = [number for batch in batches for number in batch]
        tokens = sum(map(self.count, numbers))
        self.optimizer.zero_grad()
        loss = weighted_loss = 0.0
        for batch in batches:
            losses = self.cross_entropies(batch)
            weighted = (losses * torch.tensor([self.u[number] for number in batch])).sum() / tokens
            weighted.backward()
            loss += losses.sum().item() / tokens
            weighted_loss += weighted.item()
        mean_weight = sum(self.u[number] * self.count(number) for number in numbers) / tokens
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), MAX_NORM * mean_weight).item()
        assert norm > 1.2 * MAX_NORM * mean_weight  # or the test would not see how gradients are clipped
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        distrust = sum(self.published[number] * self.count(number) for number in numbers) / tokens
        return {
            "loss": loss,
            "weighted_loss": weighted_loss,
            "distrust": distrust,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens": tokens,
        }


@pytest.mark.parametrize("rank", [4, 0])
def test_a_run_is_that_of_plain_torch(tiny_model, tmp_path, rank):
    config = TrainConfig(
        engine="torch",
        model=str(tiny_model),
        out=str(tmp_path),
        device="cpu",
        threads=1,
        max_steps=STEPS,
        batch_size=BATCH,
        gradient_accumulation=ACCUMULATION,
        learning_rate=PEAK,
        warmup_steps=2,
        max_grad_norm=MAX_NORM,
        alpha=ALPHA,
        lambda_=LAMBDA,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        weight_decay=DECAY,
        lora_rank=rank,
        lora_alpha=8.0,
        seed=SEED,
    )
    initial, trained, logged = run(config)
    plain = PlainTrainer(tiny_model, rank=rank, initial=initial)
    epochs = [permutation(len(EXAMPLES), seed=SEED, epoch=epoch) for epoch in (0, 1)]
    steps = np.concatenate(epochs)[: STEPS * ACCUMULATION * BATCH].reshape(STEPS, ACCUMULATION, BATCH)
    for event, batches, rate in zip(logged, steps.tolist(), RATES, strict=True):
        expected = plain.step(batches, rate=rate)
        actual = {name: getattr(event, name) for name in expected}
        assert actual == pytest.approx(expected, rel=1e-5)
    for name, weight in plain.weights.items():
        torch.testing.assert_close(trained[name], weight.detach(), rtol=1e-6, atol=2e-7, msg=name)
