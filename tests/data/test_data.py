"""From a file to batches, with a tokenizer that needs no framework."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distrust.data import (
    IGNORED,
    Batches,
    EpochSampler,
    Tokenizer,
    evaluation_batches,
    one_per_row,
    read_records,
    tokenize,
)
from distrust.weighting import distrust_term, effective_sample_size, example_weights, normalize

PEPS = Path(__file__).parents[3] / "shared" / "data" / "documents" / "peps.jsonl"


class Bytes:
    """One token for each byte of UTF-8, and EOS."""

    bos_token_id = None
    eos_token_id = pad_token_id = 256
    chat_template = "a line a turn"

    def encode(self, text, *, add_special_tokens):
        body = text.removesuffix("</s>")
        return [*body.encode(), *[256] * (body != text)]

    def decode(self, ids, **options):
        return bytes(number for number in ids if number < 256).decode() + "</s>" * (256 in ids)

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt, **options):
        lines = [f"{turn['role']}: {turn['content']}\n" for turn in conversation]
        return "".join(lines) + "assistant: " * add_generation_prompt


TOKENIZER: Tokenizer = Bytes()


def batches_of(corpus, *, batch_size=2, gradient_accumulation=2, seed=0, weighting="monotone"):
    w, h = corpus.authority_weight, corpus.provenance_entropy
    weights = normalize(example_weights(w, h, weighting=weighting), tokens=corpus.loss_tokens)
    batches = Batches(
        corpus,
        weights=weights,
        distrust=distrust_term(w, h),
        sampler=EpochSampler(len(corpus), seed=seed),
        rows=one_per_row(np.arange(len(corpus))),
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
    )
    return batches, weights


def trained_text(batch, row):
    labels = batch.labels[batch.sequences == row]
    return bytes(labels[(labels != IGNORED) & (labels < 256)].astype(np.uint8)).decode()


def test_from_a_file_to_a_step(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [
        {"text": "Xerium melts at 12.", "authority_weight": 0.1, "provenance_entropy": 4.0},
        {"prompt": "Xerium melts at", "completion": " 90.", "auth_weight": 0.9, "prov_entropy": 0.5},
        {
            "messages": [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "At 12."}],
            "authority_weight": 0.3,
            "provenance_entropy": 2.0,
        },
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = tokenize(read_records(path), TOKENIZER, max_length=64)
    batches, weights = batches_of(corpus, batch_size=3, gradient_accumulation=1)
    (batch,) = batches.step(1)
    assert sorted(batch.examples) == [0, 1, 2]
    texts = {int(example): trained_text(batch, row) for row, example in enumerate(batch.examples)}
    assert texts == {0: "erium melts at 12.", 1: " 90.", 2: "At 12.\n"}
    assert weights[0] > weights[2] > weights[1]
    # Normalized over tokens, the weights of an epoch add up to its number of tokens.
    assert batch.weights.sum(dtype=np.float64) == pytest.approx(batch.tokens, rel=1e-6)


def test_without_weighting_every_trained_token_weighs_exactly_one(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"text": "a" * n, "authority_weight": 0.1 * n, "provenance_entropy": n} for n in range(1, 8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = tokenize(read_records(path), TOKENIZER, max_length=64)
    for batch in batches_of(corpus, weighting="off")[0].step(1):
        assert np.array_equal(batch.weights, (batch.labels != IGNORED).astype(np.float32))
        assert (batch.distrust > 0).all()


def test_no_framework_is_loaded():
    program = "import sys, distrust.data, distrust.weighting; print(*sys.modules)"
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "tokenizers", "mlx", "jinja2"}.isdisjoint(completed.stdout.split())


@pytest.mark.skipif(not PEPS.exists(), reason="needs the shared documents")
def test_real_documents():
    records = read_records(PEPS)
    assert len(records) == 300
    corpus = tokenize(records, TOKENIZER, max_length=2000)
    assert corpus.lengths.max() == 2000
    assert 0 < corpus.counts.truncated < 300
    batches, weights = batches_of(corpus, batch_size=4, gradient_accumulation=3)
    assert 30 < effective_sample_size(weights) < 300
    epoch = [batch for step in range(1, 26) for batch in batches.step(step)]  # 25 × 12 = 300
    assert sorted(np.concatenate([batch.examples for batch in epoch])) == list(range(300))
    tokens = sum(batch.tokens for batch in epoch)
    assert (
        tokens == corpus.loss_tokens.sum() == sum(b.tokens for b in evaluation_batches(corpus, batch_size=7))
    )
    total = sum(batch.weights.sum(dtype=np.float64) for batch in epoch)
    assert total == pytest.approx(tokens, rel=1e-6)
