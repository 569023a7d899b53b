"""Operations without a deterministic kernel, and what an engine leaves of torch's settings."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from small_batches import make_batch

from distrust import CheckpointManager, DistrustTrainer, DistrustWarning, TrainConfig
from distrust.cli import main
from distrust.engines import create_engine, generate
from distrust.engines.torch import model, runtime
from distrust.run_record import RunRecord
from distrust.training.events import StepEnded

LONGER_THAN_THE_TRIAL = 13
#: torch's own warning, at each step, once the engine accepts the operation.
accepts_put = pytest.mark.filterwarnings("ignore:put_ does not have a deterministic implementation")
WARNING = "put_ has no deterministic kernel here"


def use_put() -> None:
    """Run an operation that has no deterministic kernel on any device."""
    torch.zeros(1).put_(torch.tensor([0]), torch.ones(1))


class Put(torch.autograd.Function):
    """The identity, which runs it in one of the two passes for rows of some length."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, where: str, tokens: int) -> torch.Tensor:
        ctx.runs = x.shape[1] >= tokens and where == "backward"
        if x.shape[1] >= tokens and where == "forward":
            use_put()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.runs:
            use_put()
        return gradient.clone(), None, None


@pytest.fixture
def put_in(monkeypatch) -> Callable[..., None]:
    """Puts the operation into the models that are loaded from here on."""

    def put_in(where: str, *, tokens: int = 0) -> None:
        def load(*arguments: Any, **options: Any) -> Any:
            loaded = load_model(*arguments, **options)
            loaded.model.norm.register_forward_hook(lambda _m, _i, output: Put.apply(output, where, tokens))
            return loaded

        load_model = model.load_model
        monkeypatch.setattr(model, "load_model", load)

    return put_in


def environment_of(out: Path) -> dict[str, Any]:
    """The environment in the newest checkpoint of a run."""
    manager = CheckpointManager(out / "checkpoints")
    return dict(RunRecord.from_header(manager.scan().files[-1].header).environment)


@pytest.fixture(scope="module")
def digest_alone(train, tmp_path_factory) -> str:
    """State digest of the run of these tests without the operation."""
    folder = tmp_path_factory.mktemp("digest_alone")
    digest = train(folder, max_steps=4)[0].state_digest
    assert environment_of(folder)["deterministic"] is True
    return digest


@accepts_put
@pytest.mark.parametrize("tokens", [0, LONGER_THAN_THE_TRIAL], ids=["in the trial", "in a step"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_run_goes_on_without_a_deterministic_kernel_and_says_so(
    train, tmp_path, digest_alone, put_in, where, tokens
):
    put_in(where, tokens=tokens)
    with pytest.warns(DistrustWarning, match=WARNING) as caught:
        ended, _ = train(tmp_path, max_steps=4, reload_every=3)
    assert len([str(one.message) for one in caught if issubclass(one.category, DistrustWarning)]) == 1
    assert environment_of(tmp_path)["deterministic"] is False
    assert ended.state_digest == digest_alone  # the operation is the identity


@accepts_put
def test_a_resume_says_that_it_is_no_longer_deterministic(train, tmp_path, put_in):
    train(tmp_path, stop_after=1, max_steps=2)
    put_in("backward")
    with pytest.warns(DistrustWarning) as caught:
        train(tmp_path, max_steps=2)
    messages = [str(one.message) for one in caught]
    assert any(WARNING in message for message in messages)
    assert "no longer bit-identical: deterministic was True, is False" in messages


@accepts_put
def test_each_run_of_a_process_says_it(train, tmp_path, put_in):
    put_in("forward")
    for name in ("first", "second"):
        with pytest.warns(DistrustWarning, match=WARNING):
            train(tmp_path / name, max_steps=1)


@accepts_put
def test_the_command_shows_one_line(tiny_model, data, tmp_path, put_in, capsys):
    put_in("forward")
    arguments = ["--model", tiny_model, "--data", data, "--out", tmp_path / "run", "--max-steps", 3]
    assert main(["train", "--engine", "torch", "--device", "cpu", *map(str, arguments)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "determin" in line]
    assert len([line for line in lines if WARNING in line and line.startswith("distrust: warning: ")]) == 1
    assert len(lines) == 2  # and torch's own, once


def test_warnings_of_torch_about_determinism_are_shown(tmp_path, monkeypatch, capsys):
    def warn(arguments: list[str]) -> int:
        for _ in range(2):
            warnings.warn("Flash Attention defaults to a non-deterministic algorithm.", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        return 0

    monkeypatch.setattr("distrust.cli.ls.main", warn)
    assert main(["ls", str(tmp_path)]) == 0
    shown = "distrust: warning: Flash Attention defaults to a non-deterministic algorithm.\n"
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.3}, {"lora_rank": 0}, {"dtype": "bfloat16"}], ids=str
)
def test_the_trial_leaves_no_trace(tiny_model, options):
    def gradients(*, tries_first: bool) -> list[torch.Tensor]:
        engine: Any = create_engine(
            TrainConfig(engine="torch", device="cpu", model=str(tiny_model), **{"lora_rank": 4, **options})
        )
        if not tries_first:
            engine.deterministic = True
        engine.begin_micro_step(seed=0, step=1, micro_step=0)
        engine.micro_step(make_batch(vocabulary=32), tokens=10)
        return [weight.grad for weight in engine.model.parameters() if weight.requires_grad]

    pairs = zip(gradients(tries_first=True), gradients(tries_first=False), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@accepts_put
def test_a_step_that_is_made_again_has_the_same_gradient(tiny_model, put_in):
    """Also if the operation appears in its second micro-step, in the middle of the backward pass."""

    def norm(*, accepted: bool) -> float:
        engine: Any = create_engine(
            TrainConfig(engine="torch", device="cpu", model=str(tiny_model), lora_rank=4, lora_dropout=0.3)
        )
        if accepted:
            engine.deterministic = False
        for number, lengths in enumerate([(3, 4), (9, 6), (5, 2)]):
            engine.begin_micro_step(seed=0, step=1, micro_step=number)
            losses = engine.micro_step(make_batch(vocabulary=32, lengths=lengths), tokens=10)
            assert np.isfinite(losses.weighted).all()
        return engine.clip_gradients(0.0)

    put_in("backward", tokens=LONGER_THAN_THE_TRIAL)
    with pytest.warns(DistrustWarning, match=WARNING):
        repeated = norm(accepted=False)
    assert repeated == norm(accepted=True)


#: torch's settings as a program may have them: none is its default, nor the engine's.
OWN = runtime.Settings(2, warn_only=False, fills_memory=True, cudnn_attention=True)


@pytest.fixture
def own_settings():
    """Checks that torch's settings are the program's after the test."""
    default = runtime.Settings.current()
    try:
        with OWN.use(torch.device("cpu")):
            yield
            assert runtime.Settings.current() == OWN
    finally:
        assert runtime.Settings.current() == default


def test_a_run_gives_torch_its_settings_back(tiny_model, tiny_config, tmp_path, own_settings):
    def watch(event: object) -> None:
        assert runtime.Settings.current() == OWN  # also between the steps
        if isinstance(event, StepEnded) and event.step == fails_at:
            raise ZeroDivisionError

    config = tiny_config(tmp_path, model=str(tiny_model), max_steps=3)
    engine = create_engine(config)
    fails_at = 2
    with pytest.raises(ZeroDivisionError):
        DistrustTrainer(config, observers=[watch]).train()
    fails_at = 0
    trainer = DistrustTrainer(config, engine=engine, observers=[watch])
    assert trainer.train().step == 3
    # The engine of a finished run still works, with its own settings.
    assert isinstance(generate(engine, "ore", max_new_tokens=3, temperature=0.5, seed=0), str)
    assert np.isfinite(engine.evaluate(make_batch(vocabulary=32)).cross_entropy).all()
    assert runtime.Settings.current() == OWN


def test_the_engine_computes_with_its_own_settings(tiny_model, own_settings, monkeypatch):
    in_passes = []

    def hook(*_: Any) -> None:
        in_passes.append(runtime.Settings.current())

    folder = TrainConfig(engine="torch", device="cpu", model=str(tiny_model), lora_rank=4, threads=1)
    engine: Any = create_engine(folder)
    assert engine.deterministic
    engine.model.register_forward_pre_hook(hook)
    engine.model.get_base_model().model.norm.register_forward_hook(hook)
    engine.begin_micro_step(seed=0, step=1, micro_step=0)
    engine.micro_step(make_batch(vocabulary=32), tokens=10)
    engine.evaluate(make_batch(vocabulary=32))
    strict = runtime.Settings(threads=1, warn_only=False)
    assert in_passes == [strict, strict._replace(warn_only=True)]


#: What has a precision of float32, and inherits it: that of all operations, then that of all backends.
PRECISIONS = [("generic", "all"), *itertools.product(["cuda", "mkldnn"], ["all", "matmul"])]
#: Others that inherit it. Their defaults differ between versions of torch.
UNTOUCHED = [*itertools.product(["cuda", "mkldnn"], ["conv", "rnn"])]


def set_precision(kind: tuple[str, str], precision: str) -> None:
    torch._C._set_fp32_precision_setter(*kind, precision)


def precisions() -> list[object]:
    """The precisions in effect, by their newer and their older names."""
    older: list[Callable[[], object]] = [
        lambda: torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    ]
    values: list[object] = [torch._C._get_fp32_precision_getter(*kind) for kind in PRECISIONS + UNTOUCHED]
    for read in older:
        try:
            values.append(read())
        except RuntimeError:  # they contradict the newer ones
            values.append(None)
    return values


@contextlib.contextmanager
def default_precisions():
    """What the block changes is the default afterwards."""
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for kind in PRECISIONS:
            set_precision(kind, "none")


SETTERS = st.one_of(
    st.tuples(st.sampled_from(PRECISIONS), st.sampled_from(["none", "ieee", "tf32"])),
    st.tuples(st.sampled_from([kind for kind in PRECISIONS if kind[0] == "mkldnn"]), st.just("bf16")),
    st.tuples(st.just("older"), st.sampled_from(["highest", "high", "medium"])),
    st.tuples(st.just("cuBLAS"), st.booleans()),
)


def apply(setters: list[tuple[Any, Any]]) -> None:
    for kind, precision in setters:
        if kind == "older":
            torch.set_float32_matmul_precision(precision)
        elif kind == "cuBLAS":
            torch.backends.cuda.matmul.allow_tf32 = precision
        else:
            set_precision(kind, precision)


@given(st.lists(SETTERS, max_size=5), st.lists(SETTERS, max_size=3))
@example([(("generic", "all"), "tf32")], [(("generic", "all"), "ieee")])  # inherited
@example([("older", "medium")], [])
@example([(("mkldnn", "all"), "tf32"), ("cuBLAS", True)], [(("mkldnn", "all"), "ieee")])
def test_full_precision_gives_each_precision_back(chosen, chosen_later):
    """So exactly that whatever the program sets later has the effect that it would have had."""

    @default_precisions()
    def states(*, between: Callable[[], None]) -> list[list[object]]:
        apply(chosen)
        between()
        result = [precisions()]
        for setter in chosen_later:
            apply([setter])
            result.append(precisions())
        return result

    def train() -> None:
        with runtime.full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert not torch.backends.cuda.matmul.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"

    assert states(between=train) == states(between=lambda: None)


@default_precisions()
def test_trials_compare_in_full_precision(tiny_model, monkeypatch):
    """Otherwise TF32, which the program has chosen for CUDA, would drop the fused layers."""

    def fuse(*arguments: Any, **options: Any) -> dict[str, int]:
        in_trial.append(torch.backends.cuda.matmul.fp32_precision)
        raise ZeroDivisionError

    in_trial: list[str] = []
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    config = TrainConfig(engine="torch", device="cpu", model=str(tiny_model), lora_rank=4)
    with monkeypatch.context() as failing:
        failing.setattr("distrust.engines.torch.engine.fuse", fuse)
        with pytest.raises(ZeroDivisionError):
            create_engine(config)
    assert in_trial == ["ieee"]
    assert create_engine(config).environment()["matmul_precision"] == "tf32 on CUDA"
