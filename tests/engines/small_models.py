"""Small random models of several families, and reference losses and gradients by transformers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from small_batches import VOCABULARY, pad_batch

from distrust.config import TrainConfig
from distrust.data import MicroBatch
from distrust.engines.torch.adapter import add_adapter

WINDOW = 4  # of the models with a sliding window; examples are longer

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
}
_FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "qwen2, tied": {"tie_word_embeddings": True},
    "mistral, sliding window": {"sliding_window": WINDOW},
    "gemma2, softcapping": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "qwen2_moe, window of the mask": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "sliding_attention"],
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "cohere, scaled logits": {"logit_scale": 0.25},
}


def small_model(kind: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers in evaluation mode; ``kind`` starts with the name of its family."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family = kind.split(",")[0]
    sizes = _GPT2 if family == "gpt2" else {**SIZES, **_FAMILY_SIZES.get(kind, {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
        for parameter in model.parameters():  # biases of 0 and norm weights of 1 would hide mistakes
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.config.use_cache = False
    return model.to(dtype).eval()


def add_lora(model: Any, *, rank: int, **options: Any) -> Any:
    """The model with a nonzero adapter; with rank 0 all its weights are trained."""
    if not rank:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        wrapped, _ = add_adapter(model, TrainConfig(lora_rank=rank, lora_alpha=8.0, **options))
        for parameter in trained_parameters(wrapped).values():
            parameter.data.normal_(0, 0.1)
    return wrapped.eval()


def trained_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: part for name, part in model.named_parameters() if part.requires_grad}


def inputs_of(batch: MicroBatch, *names: str) -> dict[str, torch.Tensor]:
    """What a model of transformers takes: padded tokens, their mask, and the fields with these names."""
    padded = pad_batch(batch)
    return {name: torch.from_numpy(padded[name]) for name in ("input_ids", "attention_mask", *names)}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Gradients of the trained parameters that have one."""
    return {
        name: part.grad.clone() for name, part in trained_parameters(model).items() if part.grad is not None
    }


def reference(
    model: Any, batch: MicroBatch, *, autocast: bool = False
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Cross-entropies [b, t − 1] and gradients of a copy of the model, on the padded batch."""
    model, padded = copy.deepcopy(model), inputs_of(batch, "labels", "weights")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(**inputs_of(batch)).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), padded["labels"][:, 1:], reduction="none"
    )
    (losses * padded["weights"][:, 1:]).sum().div(batch.tokens).backward()
    return losses.detach().double().numpy(), gradients(model)
