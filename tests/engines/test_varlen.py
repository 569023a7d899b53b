"""One call for all examples of a row computes what a call for each does. Its kernel here is a reference."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_varlen import varlen_attn, varlen_attn_2_11
from small_batches import make_batch
from small_models import add_lora, gradients, small_model
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from distrust.engines.torch import attention
from distrust.engines.torch.model_runner import ModelRunner

KERNELS = {"torch 2.13": varlen_attn, "torch 2.11": varlen_attn_2_11}
KERNEL = "packed, variable-length kernel"


def adapt(kernel: Any) -> Any:
    """What the engine makes of a kernel that torch has for CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", kernel)
        return attention.varlen_kernel(torch.device("cuda"), torch.bfloat16)


def use(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    """Have every runner find this kernel, as on CUDA."""
    adapted = adapt(kernel)
    monkeypatch.setattr(attention, "varlen_kernel", lambda device, dtype: adapted)


def _attend(
    kernel: Any, lengths: list[int], tensors: list[torch.Tensor], **options: Any
) -> list[torch.Tensor]:
    """The output, and the gradients of the sum of its squares."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    edges = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=tensors[0].device)
    with attention.packed_examples(lengths, kernel=kernel, cu_seqlens=edges):
        # As models have them: views of [1, n, heads, width].
        views = [leaf.transpose(1, 2) for leaf in leaves]
        output, _ = attention.packed_attention(torch.nn.Module(), *views, None, **options)
    output.square().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    groups=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    window=st.none() | st.integers(1, 10),
    scale=st.none() | st.floats(0.1, 2),
    version=st.sampled_from(list(KERNELS)),
)
def test_the_kernel_is_the_loop(lengths, groups, window, scale, version):
    key_heads, ratio = groups
    generator = torch.Generator().manual_seed(sum(lengths))
    heads = (key_heads * ratio, key_heads, key_heads)
    tensors = [
        torch.randn(1, sum(lengths), count, 8, generator=generator, dtype=torch.float64) for count in heads
    ]
    kernel = adapt(KERNELS[version])
    options = {"scaling": scale, "sliding_window": window}
    by_kernel, by_loop = (_attend(each, lengths, tensors, **options) for each in (kernel, None))
    for actual, expected in zip(by_kernel, by_loop, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.device
@pytest.mark.parametrize("window", [None, 100])
def test_the_device_attends_as_the_processor(device, window):
    """With its own kernel, if it has one, and in strict mode with the same bits again."""
    lengths, where = [1, 130, 257, 64], torch.device(device)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(lengths), heads, 64) for heads in (8, 2, 2)]
    tensors = [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]
    exact = _attend(None, lengths, [tensor.double() for tensor in tensors], sliding_window=window)
    kernel = attention.varlen_kernel(where, torch.bfloat16)
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    try:
        placed = [tensor.to(where) for tensor in tensors]
        first, again = (_attend(kernel, lengths, placed, sliding_window=window) for _ in range(2))
    finally:
        torch.set_deterministic_debug_mode(mode)
    for actual, repeated, expected in zip(first, again, exact, strict=True):
        assert torch.equal(actual, repeated)
        difference = (actual.cpu().double() - expected).norm()
        assert difference <= 0.02 * expected.norm()


def test_torchs_own_kernel_has_the_interface_of_the_reference():
    names = list(inspect.signature(varlen.varlen_attn).parameters)
    assert names in [list(inspect.signature(kernel).parameters) for kernel in KERNELS.values()]


def test_kernels_without_windows_are_not_used():
    """As in torch 2.10."""
    assert adapt(lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: None) is None


@pytest.mark.parametrize(
    ("device", "dtype", "has_kernel"),
    [
        ("cpu", torch.bfloat16, False),
        ("mps", torch.bfloat16, False),
        ("cuda", torch.float32, False),
        ("cuda", torch.bfloat16, True),
        ("cuda:1", torch.float16, True),
    ],
)
def test_the_kernel_is_for_half_precision_on_cuda(device, dtype, has_kernel):
    assert (attention.varlen_kernel(torch.device(device), dtype) is not None) == has_kernel


def _train(kind: str, *, checkpointing: bool = False, rank: int = 4, dtype: Any = torch.float32) -> Any:
    """What runs the attention; losses; gradients."""
    base = small_model(kind)
    if checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        base.enable_input_require_grads()
    model, batch = add_lora(base, rank=rank), make_batch()
    runner = ModelRunner(base, compute_dtype=dtype)
    runner.require_causal(kind)
    model.train()
    losses = runner.train(batch, tokens=batch.tokens)
    return runner.packing, losses.cross_entropy, gradients(model)


@pytest.mark.parametrize("version", KERNELS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("llama", {"checkpointing": True}),
        ("llama", {"rank": 0, "dtype": torch.bfloat16}),  # queries in float32, values in bfloat16
        ("mistral, sliding window", {"checkpointing": True}),
        ("gpt2", {}),
    ],
)
def test_models_compute_the_same_with_the_kernel(monkeypatch, kind, options, version):
    loop, expected, expected_gradients = _train(kind, **options)
    assert loop == "packed"
    use(monkeypatch, KERNELS[version])
    used, losses, actual = _train(kind, **options)
    assert used == KERNEL
    rounding = 1e-5 if "dtype" not in options else 0.08
    np.testing.assert_allclose(losses, expected, rtol=rounding)
    assert actual.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (actual[name] - gradient).norm() <= rounding * gradient.norm() + 1e-6, name


def _one_example(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
    """Ignores where examples begin."""
    edges = torch.tensor([0, len(query)], dtype=torch.int32)
    return varlen_attn_2_11(query, key, value, edges, edges, len(query), len(query), **options)


def _sees_the_future(*arguments, window_size, **options):
    return varlen_attn_2_11(*arguments, window_size=(window_size[0], -1), **options)


def _other_scale(*arguments, scale, **options):
    return varlen_attn_2_11(*arguments, scale=3 * scale, **options)


def _unavailable(*arguments, **options):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


@pytest.mark.parametrize("kernel", [_one_example, _sees_the_future, _other_scale, _unavailable])
def test_a_kernel_that_is_wrong_for_a_model_is_not_used(monkeypatch, kernel):
    expected = _train("llama")
    accepts_windows = inspect.signature(varlen_attn_2_11)
    kernel.__signature__ = accepts_windows
    use(monkeypatch, kernel)
    loop, losses, actual = _train("llama")
    assert loop == "packed"
    np.testing.assert_array_equal(losses, expected[1])
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected[2].items())


def test_models_that_mix_examples_are_padded(monkeypatch):
    use(monkeypatch, varlen_attn)
    assert ModelRunner(small_model("gemma2, softcapping"), compute_dtype=torch.float32).packing == ("padded")


def test_attention_with_dropout_is_the_loop(monkeypatch):
    """The kernel has no dropout."""
    use(monkeypatch, _unavailable)
    tensors = [torch.randn(1, 5, 2, 8) for _ in range(3)]
    torch.manual_seed(0)
    expected = _attend(None, [2, 3], tensors, dropout=0.5)
    torch.manual_seed(0)
    for actual, tensor in zip(_attend(_unavailable, [2, 3], tensors, dropout=0.5), expected, strict=True):
        assert torch.equal(actual, tensor)


class _HostReads(TorchDispatchMode):
    """Counts the numbers that are read from tensors, for which the host waits on CUDA."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "cohere, scaled logits"])
def test_no_layer_waits_for_the_device(monkeypatch, kind):
    """With the mask of CUDA, and with the same outputs as without it."""
    batch, reads, losses = make_batch(), [], []
    for mask_of_row in (attention.mask_of_row, torch.ones_like):
        monkeypatch.setattr(attention, "mask_of_row", mask_of_row)
        runner = ModelRunner(small_model(kind), compute_dtype=torch.float32)
        assert runner.uses_varlen
        with _HostReads() as counter:
            losses.append(runner.evaluate(batch))
        reads.append(counter.count)
    assert reads == [1, 0]
    np.testing.assert_array_equal(losses[0].cross_entropy, losses[1].cross_entropy)
