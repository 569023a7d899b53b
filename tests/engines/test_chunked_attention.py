"""Models whose tokens attend only within their chunk of the text, as in most layers of Llama 4."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_batches import flat_batch
from transformers import AutoModelForCausalLM, Llama4TextConfig

from distrust.data import IGNORED
from distrust.engines.torch.model_runner import ModelRunner


@pytest.mark.parametrize("length", [5, 9, 23])
def test_examples_longer_than_a_chunk_have_the_models_loss(length):
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        attention_chunk_size=8,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = np.random.default_rng(0).integers(3, 60, (2, length))
    labels = ids.copy()
    labels[:, 0] = IGNORED
    batch = flat_batch((length, length), ids.ravel(), labels.ravel())
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss.item()
    losses = ModelRunner(model, compute_dtype=torch.float32).evaluate(batch)
    assert losses.cross_entropy.sum() / batch.tokens == pytest.approx(expected, rel=1e-5)
