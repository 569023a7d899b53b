"""liger-kernel is used on CUDA, where it is installed and a trial agrees; here a CPU is told to use it."""

from __future__ import annotations

import copy
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

import fake_liger
import pytest
import torch
from fake_liger import SUFFIX
from small_models import add_lora, gradients, small_model
from test_layers import ALL, LAYERS, ROUNDING, assert_same, logits_and_gradients

from distrust import DistrustWarning, activity
from distrust.config import TrainConfig
from distrust.engines import create_engine
from distrust.engines.torch import liger
from distrust.engines.torch.layers import fuse

ROPE = {f"rope{SUFFIX}": LAYERS}
WITH_LIGER = {**ALL, "norm": 0, "gate": 0, f"norm{SUFFIX}": ALL["norm"], f"gate{SUFFIX}": ALL["gate"], **ROPE}


@pytest.fixture
def install(monkeypatch):
    """Installs the library, with some functions replaced."""

    def replace_loader(**functions: object) -> None:
        monkeypatch.setattr(liger, "load", lambda: fake_liger.functions(**functions))

    return replace_loader


def check(model, counts, *, dtype=torch.float32):
    plain = copy.deepcopy(model)
    assert fuse(model, dtype=dtype, cuda=True) == counts
    for each in (model, copy.deepcopy(model)):  # a copy computes the same
        for training in (False, True):
            actual = logits_and_gradients(each.train(training))
            assert_same(actual, logits_and_gradients(plain.train(training)), rounding=ROUNDING[dtype])


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*(("llama", dtype) for dtype in ROUNDING), ("qwen2", torch.float32), ("mistral", torch.bfloat16)],
)
def test_used_where_a_trial_agrees(install, family, dtype):
    install()
    check(add_lora(small_model(family, dtype=dtype), rank=4), WITH_LIGER, dtype=dtype)


@pytest.mark.parametrize("modules", [("gate_proj", "down_proj"), ("up_proj",), ("down_proj",), ("o_proj",)])
def test_any_subset_of_adapted_modules(install, modules):
    install()
    model = add_lora(small_model("llama"), rank=4, target_modules=modules)
    check(model, {**WITH_LIGER, "lora": len(modules) * LAYERS})


def test_dropout_leaves_the_gate_fused(install):
    install()
    check(add_lora(small_model("llama"), rank=4, lora_dropout=0.3), WITH_LIGER)


def test_trained_norms_have_gradients(install):
    install()
    model = small_model("llama")
    check(model, {**WITH_LIGER, "lora": 0})
    norms = [gradient for name, gradient in gradients(model).items() if "norm" in name]
    assert len(norms) == ALL["norm"]
    assert all(float(gradient.norm()) > 0 for gradient in norms)


def test_a_norm_that_multiplies_by_one_plus_its_weight(install):
    """Gemma 2, which adds the norm's result to a residual: both need the incoming gradient."""
    install()
    counts = {
        "lora": 7 * LAYERS,
        "norm": 0,
        "gate": 0,
        f"norm{SUFFIX}": 4 * LAYERS + 1,
        f"rope{SUFFIX}": LAYERS,
    }
    check(add_lora(small_model("gemma2, softcapping"), rank=4), counts)


def test_left_where_a_trial_disagrees(install):
    class Wrong(fake_liger.LigerRMSNormFunction):
        @staticmethod
        def forward(ctx, x, weight, *options):
            return 1.01 * fake_liger.LigerRMSNormFunction.forward(ctx, x, weight, *options)

    install(LigerRMSNormFunction=Wrong, swiglu_forward=lambda a, b: fake_liger.swiglu_forward(b, a))
    check(add_lora(small_model("llama"), rank=4), {**ALL, **ROPE})


@pytest.mark.parametrize("factor", [1.01, -1.0, float("nan")])
def test_left_where_the_gradient_of_a_trial_disagrees(install, factor):
    class Wrong(fake_liger.LigerRMSNormFunction):
        @staticmethod
        def backward(ctx, grad_output):
            grad_x, *gradients = fake_liger.LigerRMSNormFunction.backward(ctx, grad_output)
            return factor * grad_x, *gradients

    def wrong_backward(*tensors):
        grad_a, grad_b = fake_liger.swiglu_backward(*tensors)
        return grad_a, factor * grad_b

    install(LigerRMSNormFunction=Wrong, swiglu_backward=wrong_backward)
    check(add_lora(small_model("llama"), rank=4), {**ALL, **ROPE})


def test_cpus_try_forward_passes_only(monkeypatch):
    """Their start takes no longer, and the bits of their runs stay."""
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a backward pass"))
    assert fuse(add_lora(small_model("llama"), rank=4), dtype=torch.float32) == ALL


@pytest.mark.parametrize(
    "error", [RuntimeError("no kernel image"), Exception("CompilationError"), AssertionError()]
)
def test_left_where_it_fails(install, error):
    def fail(*_):
        raise error

    install(swiglu_forward=fail)
    counts = {**ALL, "norm": 0, f"norm{SUFFIX}": ALL["norm"], **ROPE}
    check(add_lora(small_model("llama"), rank=4), counts)


def test_not_used_on_a_cpu(monkeypatch, tiny_model):
    monkeypatch.setattr(liger, "load", lambda: pytest.fail("loaded"))
    config = TrainConfig(engine="torch", model=str(tiny_model), lora_rank=4, threads=1, device="cpu")
    assert {*create_engine(config).environment()["fused"]} == {"lora", "norm", "gate"}


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="it is installed here")
def test_not_used_where_it_is_not_installed():
    assert liger.load() is None
    check(add_lora(small_model("llama"), rank=4), ALL)


@pytest.fixture
def put_library(monkeypatch):
    """Puts a library of that name into the process."""

    def put_library(ops: object) -> None:
        package = types.ModuleType("liger_kernel")
        package.__spec__ = ModuleSpec("liger_kernel", None)
        package.ops = ops
        monkeypatch.setitem(sys.modules, "liger_kernel", package)
        monkeypatch.setattr(activity.current, "warned", set())

    return put_library


class BrokenCompiler:
    def __getattr__(self, name: str) -> object:
        raise ImportError("libtriton.so: undefined symbol")


@pytest.mark.parametrize(
    ("ops", "reason"),
    [
        (types.SimpleNamespace(), "AttributeError: .*LigerRMSNormFunction.*"),
        (BrokenCompiler(), "ImportError: libtriton.so: undefined symbol"),
        (fake_liger.functions(), "PackageNotFoundError: .*liger-kernel"),  # a nightly has another name
    ],
    ids=["another version", "a broken compiler", "another name"],
)
@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="it is installed here")
def test_one_line_where_it_does_not_work(put_library, ops, reason):
    put_library(ops)
    text = f"^liger-kernel is not used, because it does not work here: {reason}$"
    with pytest.warns(DistrustWarning, match=text) as caught:
        assert [liger.load(), liger.load()] == [None, None]
    assert len(caught) == 1
