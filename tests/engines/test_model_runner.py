"""The model runner computes the losses and gradients of transformers' own padded batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from small_batches import make_batch
from small_models import add_lora, gradients, inputs_of, reference, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distrust.engines.torch import attention, loss
from distrust.engines.torch.layers import fuse, linear
from distrust.engines.torch.loss import chunked_losses
from distrust.engines.torch.model_runner import ModelRunner

BFLOAT16 = torch.bfloat16
#: kind of model -> (uses_varlen, uses_chunked_loss)
METHODS = {
    "llama": (True, True),
    "qwen2, tied": (True, True),
    "mistral, sliding window": (True, True),
    "gpt2": (True, True),
    "gemma2, softcapping": (False, False),
    "cohere, scaled logits": (True, False),
    "qwen2_moe, window of the mask": (False, True),
}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, rounding: float):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        difference = float((actual[name] - gradient).norm())
        assert difference <= rounding * float(gradient.norm()) + 1e-7, name


def check(
    model: Any, base: Any, *, arithmetic: torch.dtype = torch.float32, rounding: float = 2e-5
) -> ModelRunner:
    """Compare losses and gradients with transformers'; returns the runner."""
    batch = make_batch()
    losses, expected = reference(model, batch, autocast=arithmetic is not torch.float32)
    fuse(model, dtype=next(base.parameters()).dtype)
    runner = ModelRunner(base, compute_dtype=arithmetic)
    evaluation_losses = runner.evaluate(batch)
    model.train()
    training_losses = runner.train(batch, tokens=batch.tokens)
    for result in (evaluation_losses, training_losses):
        np.testing.assert_allclose(result.cross_entropy, losses.sum(axis=1), rtol=rounding)
        weighted = (losses * batch.pad(batch.weights, filler=0)[:, 1:]).sum(axis=1)
        np.testing.assert_allclose(result.weighted, weighted, rtol=rounding)
    assert_close(gradients(model), expected, rounding=rounding)
    return runner


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("kind", METHODS)
def test_losses_and_gradients_are_those_of_padded_examples(kind, rank):
    base = small_model(kind)
    runner = check(add_lora(base, rank=rank), base)
    assert (runner.uses_varlen, runner.uses_chunked_loss) == METHODS[kind]


@pytest.mark.parametrize(("rank", "dtype"), [(4, BFLOAT16), (0, torch.float32)])
@pytest.mark.parametrize("kind", ["llama", "mistral, sliding window", "gpt2"])
def test_in_bfloat16(kind, rank, dtype):
    base = small_model(kind, dtype=dtype)
    runner = check(add_lora(base, rank=rank), base, arithmetic=BFLOAT16, rounding=0.08)
    assert runner.uses_varlen
    assert runner.uses_chunked_loss


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_with_checkpointed_layers(kind, rank):
    base = small_model(kind)
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if rank:
        base.enable_input_require_grads()
    assert check(add_lora(base, rank=rank), base).uses_varlen


def test_the_token_that_pads_does_not_matter():
    batch, results = make_batch(), []
    for pad_token_id in (2, 60):
        base = small_model("cohere, scaled logits")
        model = add_lora(base, rank=4)
        base.set_attn_implementation("eager")  # examples that cannot share a row
        runner = ModelRunner(base, compute_dtype=torch.float32, pad_token_id=pad_token_id)
        assert not runner.uses_varlen
        losses = runner.train(batch, tokens=batch.tokens)
        results.append((losses.weighted, gradients(model)))
    (one, gradients_of_one), (two, gradients_of_two) = results
    assert np.array_equal(one, two)
    assert all(torch.equal(gradients_of_one[name], gradients_of_two[name]) for name in gradients_of_one)


def test_the_loss_is_that_of_transformers():
    model, batch = small_model("llama"), make_batch()
    with torch.no_grad():
        loss = model(**inputs_of(batch, "labels")).loss
    losses = ModelRunner(model, compute_dtype=torch.float32).evaluate(batch)
    assert losses.cross_entropy.sum() / batch.tokens == pytest.approx(float(loss), rel=1e-5)


class _MixingNorm(torch.nn.Module):
    """A norm that mixes each token with the previous one."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden + torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1])


class _ContinuousRotary(torch.nn.Module):
    """Rotary positions that ignore where an example starts."""

    def __init__(self, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.rotary(hidden, torch.arange(hidden.shape[1])[None] ** 2)


@pytest.mark.parametrize("fault", ["attention", "positions", "a layer"])
def test_models_that_mix_packed_examples_do_not_use_varlen(monkeypatch, fault):
    model = small_model("llama")
    if fault == "attention":
        original = attention.packed_attention

        def leaking(module, query, *tensors, **options):
            with attention.packed_examples([query.shape[2]]):
                return original(module, query, *tensors, **options)

        monkeypatch.setattr(attention, "packed_attention", leaking)
    elif fault == "positions":
        model.model.rotary_emb = _ContinuousRotary(model.model.rotary_emb)
    else:
        model.model.layers[1].input_layernorm = _MixingNorm(model.model.layers[1].input_layernorm)
    assert not check(model, model).uses_varlen


@pytest.mark.parametrize("chosen", ["eager", "sdpa"])
def test_a_chosen_attention_is_not_replaced(chosen):
    model = small_model("llama")
    model.set_attn_implementation(chosen)
    assert ModelRunner(model, compute_dtype=torch.float32).uses_varlen == (chosen == "sdpa")
    if chosen == "eager":
        assert model.config._attn_implementation == "eager"


def test_the_model_is_unchanged_outside_of_passes():
    """For generation, and for direct calls of the model."""
    model, plain, batch = small_model("llama"), small_model("llama"), make_batch()
    assert ModelRunner(model, compute_dtype=torch.float32).uses_varlen
    assert torch.equal(model(**inputs_of(batch)).logits, plain(**inputs_of(batch)).logits)


def _head(
    *, tokens: int, width: int, words: int, seed: int, dtypes: tuple[torch.dtype, torch.dtype], trains: Any
) -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """Inputs of a head, the head, targets and token weights. A ``trains["bias"]`` of None: it has no bias."""
    generator = torch.Generator().manual_seed(seed)
    dtype, head_dtype = dtypes
    head = torch.nn.Linear(width, words, bias=trains["bias"] is not None).to(head_dtype)
    for name, part in head.named_parameters():
        part.data.copy_(torch.randn(part.shape, generator=generator) * 2)
        part.requires_grad_(trains[name])
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_(trains["hidden"])
    targets = torch.randint(words, (tokens,), generator=generator)
    token_weights = torch.rand(tokens, generator=generator)
    token_weights *= torch.randint(0, 2, (tokens,), generator=generator)
    return hidden, head, targets, token_weights


_FLOAT32 = torch.float32
_HEADS = {
    "tokens": st.integers(0, 9),
    "width": st.integers(1, 6),
    "words": st.integers(1, 12),
    "seed": st.integers(0, 99),
    "dtypes": st.sampled_from([(_FLOAT32, _FLOAT32), (BFLOAT16, BFLOAT16), (BFLOAT16, _FLOAT32)]),
    "trains": st.fixed_dictionaries(
        {"hidden": st.booleans(), "weight": st.booleans(), "bias": st.none() | st.booleans()}
    ),
}
_ALL_TRAINED = {"hidden": True, "weight": True, "bias": True}


@settings(max_examples=60)
@example(
    case={"tokens": 9, "width": 4, "words": 5, "seed": 0, "dtypes": (_FLOAT32,) * 2, "trains": _ALL_TRAINED},
    chunk_tokens=4,  # gradients add up over chunks
)
@given(case=st.fixed_dictionaries(_HEADS), chunk_tokens=st.integers(1, 10))
def test_chunked_losses_are_the_cross_entropy_of_all_logits(case, chunk_tokens):
    hidden, head, targets, token_weights = _head(**case)
    leaves = [part for part in (hidden, *head.parameters()) if part.requires_grad]
    parts = (hidden, head.weight, head.bias)
    exact = [None if part is None else part.detach().double().requires_grad_() for part in parts]
    logits = torch.nn.functional.linear(*exact)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    total, losses = chunked_losses(hidden, head, targets, token_weights, chunk_tokens=chunk_tokens)
    rounding = 1e-5 if hidden.dtype == torch.float32 else 0.1
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=rounding, atol=rounding)
    torch.testing.assert_close(total, (losses * token_weights).sum())
    assert not losses.requires_grad
    assert total.requires_grad == bool(leaves)
    if not leaves:
        return
    (total * 3).backward()
    (expected * token_weights.double() * 3).sum().backward()
    for tensor, reference_tensor in zip(parts, exact, strict=True):
        if tensor is None or not tensor.requires_grad:
            assert tensor is None or tensor.grad is None
            continue
        assert tensor.grad.dtype == tensor.dtype
        size = float(reference_tensor.grad.norm()) if reference_tensor.grad.numel() else 0.0
        difference = float((tensor.grad.double() - reference_tensor.grad).norm())
        assert difference <= rounding * size + rounding * 0.1


@settings(max_examples=60)
@given(
    logits=arrays(np.float64, (3, 5), elements=st.floats(-300, 300)),
    weights=arrays(np.float64, 3, elements=st.sampled_from([0.0, 1e-9, 0.3, 2.0])),
    differentiate=st.booleans(),
)
def test_few_passes_over_the_logits_round_them_once_or_twice(logits, weights, differentiate):
    """The method for GPUs, in bfloat16: losses exact in float32, gradients to the precision of bfloat16."""
    logits, weights = torch.from_numpy(logits).to(BFLOAT16), torch.from_numpy(weights)[:, None]
    exact, targets = logits.double().requires_grad_(), torch.tensor([0, 4, 4])
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (expected * weights[:, 0]).sum().backward()
    losses, grad = loss._by_few_passes(logits, targets[:, None], weights.float(), differentiate)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-4)
    if not differentiate:
        assert grad is None
        return
    assert grad.dtype == BFLOAT16
    torch.testing.assert_close(grad.double(), exact.grad, rtol=2**-7, atol=1e-7)


def test_a_gpu_has_larger_chunks_and_fewer_passes(monkeypatch):
    """As on CUDA: the same losses and gradients as all logits, to rounding."""
    monkeypatch.setattr(loss, "_method", lambda hidden: loss._by_few_passes)
    dtypes = (BFLOAT16, BFLOAT16)
    hidden, head, targets, weights = _head(
        tokens=9, width=4, words=5, seed=0, dtypes=dtypes, trains=_ALL_TRAINED
    )
    total, losses = chunked_losses(hidden, head, targets, weights, chunk_tokens=4)
    total.backward()
    exact = [part.detach().double().requires_grad_() for part in (hidden, head.weight, head.bias)]
    expected = torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(*exact), targets, reduction="none"
    )
    (expected * weights.double()).sum().backward()
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=0.05, atol=0.05)
    for part, reference_part in zip((hidden, head.weight, head.bias), exact, strict=True):
        difference = (part.grad.double() - reference_part.grad).norm()
        assert difference <= 0.05 * reference_part.grad.norm()


@pytest.mark.device
@pytest.mark.parametrize("dtype", [_FLOAT32, BFLOAT16])
def test_the_device_has_the_loss_of_the_processor(device, dtype):
    case = {"tokens": 300, "width": 16, "words": 1000, "seed": 0, "dtypes": (dtype, dtype)}
    results = []
    for where in ("cpu", device):
        hidden, head, targets, weights = _head(**case, trains=_ALL_TRAINED)
        hidden = hidden.detach().to(where).requires_grad_()
        head = head.to(where)
        total, losses = chunked_losses(hidden, head, targets.to(where), weights.to(where), chunk_tokens=128)
        total.backward()
        results.append([losses, hidden.grad, *(part.grad for part in head.parameters())])
    for actual, expected in zip(results[1], results[0], strict=True):
        difference = (actual.cpu().double() - expected.double()).norm()
        assert difference <= (1e-5 if dtype == _FLOAT32 else 0.02) * expected.double().norm()


def test_no_gradient_is_allocated_without_grad_mode(monkeypatch):
    """An evaluation with a trained head must not allocate a gradient of the size of the head."""
    head = torch.nn.Linear(4, 8)
    shapes = []
    zeros_like = torch.zeros_like
    monkeypatch.setattr(
        torch, "zeros_like", lambda like, **more: shapes.append(like.shape) or zeros_like(like, **more)
    )
    arguments = torch.randn(3, 4), head, torch.tensor([0, 5, 7]), torch.ones(3)
    with torch.no_grad():
        assert not chunked_losses(*arguments)[0].requires_grad
    assert shapes == []
    chunked_losses(*arguments)
    assert shapes == [head.weight.shape, head.bias.shape]


class _Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation creates."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        sizes = [part.numel() for part in tree_leaves(output) if isinstance(part, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return output


def test_the_logits_never_exist_as_a_whole():
    tokens, width, words = 1000, 3, 70
    head = torch.nn.Linear(width, words)
    hidden = torch.randn(tokens, width, requires_grad=True)
    with _Largest() as largest:
        total, _ = chunked_losses(
            hidden, head, torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens), chunk_tokens=10
        )
        total.backward()
    assert largest.numbers == tokens * width  # all logits would be tokens * words


@settings(max_examples=30)
@given(tokens=st.integers(1, 60), chunk_tokens=st.integers(1, 40), part_tokens=st.integers(1, 12))
def test_no_part_of_a_chunk_is_larger_than_its_limit(tokens, chunk_tokens, part_tokens):
    """On a CPU, with a frozen head; a trained one sums its gradient over whole chunks."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, 8, generator=generator)
    targets = torch.randint(23, (tokens,), generator=generator)
    for is_frozen in (True, False):
        head = torch.nn.Linear(8, 23, bias=False).requires_grad_(not is_frozen)
        results, products = [], []

        def record(inputs, *weights, products=products):
            products.append(len(inputs))
            return linear(inputs, *weights)

        for limit in (10**9, part_tokens * 23):
            products.clear()
            inputs = hidden.clone().requires_grad_()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loss, "PART_LOGITS", limit)
                patch.setattr(loss, "linear", record)
                weights = torch.ones(tokens)
                total, each = chunked_losses(inputs, head, targets, weights, chunk_tokens=chunk_tokens)
            total.backward()
            results.append([total.detach(), each, inputs.grad])
        limit = min(chunk_tokens, part_tokens) if is_frozen else chunk_tokens
        assert max(products) <= limit
        assert sum(products) == 2 * tokens  # forward and backward
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(expected, actual)
