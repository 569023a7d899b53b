"""Steps are made twice and compared: what a machine computes wrongly is noticed, and undone."""

from __future__ import annotations

import re
import tempfile
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distrust import ConfigError, DistrustTrainer, DistrustWarning, NonFiniteLoss, TrainConfig, WrongResult
from distrust.engines import create_engine
from distrust.testing.toy_engine import ToyEngine
from distrust.training.recheck import HostCopy, require_repeatable

STEP = 4  # whose update flips a bit

needs_mlx = pytest.mark.skipif(find_spec("mlx_lm") is None, reason="mlx-lm is not installed")


def flip(array, number, bit):
    """Flip one bit of an element."""
    array.reshape(-1).view(f"u{array.itemsize}")[number] ^= np.array(1 << bit, f"u{array.itemsize}")


def flip_toy(engine, frozen, bit=20):
    flip(engine._base if frozen else engine._table, 5, bit)
    return "base" if frozen else "model.table"


def flip_torch(engine, frozen):
    name = "input_layernorm.weight" if frozen else "lora_B.default.weight"
    full_name, weight = next(item for item in engine.model.named_parameters() if item[0].endswith(name))
    flip(weight.detach().numpy(), 5, 20)
    return full_name if frozen else f"model.{full_name.replace('.default', '')}"


def flip_mlx(engine, frozen):
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    arrays = dict(tree_flatten(engine._model.parameters())) if frozen else engine._trained
    name = next(name for name in arrays if name.endswith("input_layernorm.weight" if frozen else "lora_b"))
    content = np.array(arrays[name])
    flip(content, 5, 20)
    if frozen:
        engine._model.update(tree_unflatten([(name, mx.array(content))]))
    else:
        engine._trained[name] = mx.array(content)
    return name if frozen else f"model.{name}"


class Machine:
    """Makes engines. In these attempts to make STEP, a bit of their memory flips: before it, or after."""

    def __init__(self, make, flip_bit, *, frozen=False, calls=(1,), early=False):
        self.make, self.flip_bit, self.frozen, self.calls, self.early = make, flip_bit, frozen, calls, early
        self.count, self.name, self.engines = 0, "", 0

    def __call__(self, config):
        engine = self.make(config)
        accumulate, update, steps = engine.accumulate, engine.update, []
        self.engines += 1

        def flip_if_due(*, now):
            if steps[-1] == STEP and now and self.count in self.calls:
                self.name = self.flip_bit(engine, self.frozen)

        def watched_accumulate(batches, *, seed, step, tokens):
            steps.append(step)
            self.count += step == STEP
            flip_if_due(now=self.early)
            return accumulate(batches, seed=seed, step=step, tokens=tokens)

        def faulty_update(*, learning_rate):
            update(learning_rate=learning_rate)
            flip_if_due(now=not self.early)

        engine.accumulate, engine.update = watched_accumulate, faulty_update
        return engine


def toy(config):
    return ToyEngine()


ENGINES = {"toy": (toy, flip_toy), "torch": (create_engine, flip_torch), "mlx": (create_engine, flip_mlx)}


@pytest.fixture
def train_on(run, tiny_config, tiny_model):
    """Trains with an engine: the toy, or the tiny model."""

    def train_on(name, machine, out, **options):
        if name == "toy":
            return run(out, engine=machine, **options)[0]
        config = tiny_config(out, **{"model": str(tiny_model), "engine": name, "max_steps": STEP, **options})
        return DistrustTrainer(config, engine=machine, observers=[]).train()

    return train_on


@pytest.mark.parametrize("engine", ["toy", "torch", pytest.param("mlx", marks=needs_mlx)])
def test_a_flipped_bit_is_named_or_undone(train_on, tmp_path, engine):
    make, flip_bit = ENGINES[engine]
    alone = train_on(engine, make, tmp_path / "alone")
    for frozen in (False, True):
        machine, out = Machine(make, flip_bit, frozen=frozen), tmp_path / f"stopped-{frozen}"
        with pytest.raises(WrongResult) as raised:
            train_on(engine, machine, out, recheck_every=2, save_every=0)
        first, *findings = str(raised.value).splitlines()
        assert first == (
            "step 4: this machine computes wrongly; step 3 is saved. "
            "On another machine the same command goes on"
        )
        assert raised.value.step == STEP
        assert [*raised.value.differences[:10]] == findings[:10]
        if frozen:  # with the second attempt, which had the changed weight
            assert findings[0] == f"{machine.name}: this frozen weight has changed"
        else:
            (line,) = findings
            assert re.fullmatch(re.escape(machine.name) + r": digest (\w{16}) and digest (?!\1)\w{16}", line)
        if not frozen:
            assert train_on(engine, make, out).state_digest == alone.state_digest

        machine = Machine(make, flip_bit, frozen=frozen)
        with pytest.warns(
            DistrustWarning, match="^step 4: this machine computes wrongly; two attempts"
        ) as caught:
            ended = train_on(
                engine, machine, tmp_path / f"rewound-{frozen}", recheck_every=1, on_mismatch="rewind"
            )
        assert ended.state_digest == alone.state_digest
        (message,) = [str(warning.message) for warning in caught]
        assert machine.name in message
        assert machine.engines == 1 + frozen  # a changed frozen weight is loaded again


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    element=st.integers(0, 1023),
    bit=st.integers(0, 31),
    calls=st.sampled_from([{1}, {2}, {1, 2}, {1, 3}, {2, 3}]),
    array=st.sampled_from(["_base", "_table", "_first", "_second"]),
    early=st.booleans(),
)
def test_any_flipped_bit_is_undone(run, alone, element, bit, calls, array, early):
    """In weights and moments: also one that makes the loss infinite; in later attempts, other bits."""

    def flip_bit(engine, _):
        flip(getattr(engine, array), (element + machine.count) % 1024, bit)
        return array

    machine = Machine(toy, flip_bit, calls=calls, early=early)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, too
        ended, _ = run(Path(folder), engine=machine, recheck_every=4, on_mismatch="rewind", save_every=0)
    assert machine.name
    assert ended.state_digest == alone.state_digest


def test_no_two_attempts_agree(run, alone, tmp_path):
    bits = iter(range(10))
    machine = Machine(toy, lambda engine, frozen: flip_toy(engine, frozen, bit=next(bits)), calls=range(1, 6))
    with pytest.raises(WrongResult, match=r"^step 4: this machine computes wrongly; step 3 is saved"):
        run(tmp_path, engine=machine, recheck_every=1, on_mismatch="rewind")
    assert run(tmp_path)[0].state_digest == alone.state_digest


def test_a_frozen_weight_that_changed_between_rechecks(run, alone, tmp_path):
    """It may be in the steps since, so it is not hidden by loading it again."""
    machine = Machine(toy, flip_toy, frozen=True)
    with pytest.raises(WrongResult) as raised:
        run(tmp_path, engine=machine, recheck_every=3, on_mismatch="rewind", keep_last=9)
    assert str(raised.value).splitlines() == [
        "step 6: this machine computes wrongly; later steps than 3 may be wrong: go on from a checkpoint of "
        "step 3 or before, with --from-step and --branch",
        "base: this frozen weight has changed",
    ]
    branch = tmp_path / "branch"
    ended, _ = run(tmp_path, from_step=2, branch=str(branch))
    assert ended.state_digest == alone.state_digest


def test_an_engine_that_was_given_is_not_built_again(run, tmp_path):
    engine = Machine(toy, flip_toy, frozen=True)(None)
    with pytest.raises(WrongResult, match="\nbase: this frozen weight has changed"):
        run(tmp_path, engine=engine, recheck_every=1, on_mismatch="rewind")


def test_a_loss_that_is_not_finite_again_ends_the_run(run, tmp_path):
    with pytest.raises(NonFiniteLoss, match="step 1: the loss is not finite"):
        run(tmp_path, engine=ToyEngine(poisoned=range(11)), recheck_every=1, on_mismatch="rewind")


def test_a_copy_that_changed_is_not_trusted():
    engine = ToyEngine()
    copy = HostCopy(engine)
    assert copy.load(engine)
    flip(copy._data["model.table"], 7, 3)
    assert not copy.load(engine)


@pytest.mark.parametrize(
    ("options", "environment", "reason"),
    [
        ({}, {"deterministic": False}, "an operation has no deterministic kernel"),
        ({"compile": True}, {}, "with --compile a layer may be compiled again"),
        ({"shard": "base"}, {}, "with --shard base no rank has the whole state"),
    ],
)
def test_what_cannot_be_repeated_is_refused(options, environment, reason):
    engine = ToyEngine(environment={"threads": 1, **environment})
    engine.framework = "torch"
    config = TrainConfig(recheck_every=5, **options)
    with pytest.raises(ConfigError, match=f"^--recheck-every 5: a step cannot be repeated: {reason}$"):
        require_repeatable(config, engine)
    require_repeatable(replace(config, recheck_every=None), engine)
