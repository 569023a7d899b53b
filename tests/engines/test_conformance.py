"""The contract of ``training/engine.py``: one suite, for the engines of torch and mlx and for the toy one.

What is computed exactly so is compared bit for bit; sums that are made in another order, to rounding.
"""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_batches import LENGTHS, a_batch, some_of, weighing

from distrust import Checkpoint, CheckpointManager, TrainConfig
from distrust.contract import Engine, EngineState, Losses
from distrust.data import MicroBatch
from distrust.engines import create_engine
from distrust.errors import ResumeRefused
from distrust.testing.models import make_model
from distrust.testing.toy_engine import VOCABULARY, ToyEngine

Make = Callable[..., Engine]

BATCH = a_batch(vocabulary=VOCABULARY)
EXAMPLES = range(len(LENGTHS))
mlx_only = pytest.mark.skipif(find_spec("mlx_lm") is None, reason="mlx-lm is not installed")
ENGINES = ["toy", "torch", pytest.param("mlx", marks=mlx_only)]
few = settings(max_examples=6, deadline=None)


@pytest.fixture(scope="module")
def bases(tiny_model, tmp_path_factory) -> list[Path]:
    """Folders of two models, and of the first again."""
    folder = tmp_path_factory.mktemp("bases")
    return [tiny_model, make_model(folder / "other", seed=1), make_model(folder / "same", seed=0)]


@pytest.fixture(scope="module", params=ENGINES)
def make(request, bases) -> Make:
    """Makes an engine, untrained: ``make(dropout=0.3, base=1)``."""

    def make(*, dropout: float = 0.0, base: int = 0) -> Engine:
        if request.param == "toy":
            return ToyEngine(base=base % 2, dropout=dropout)
        options = {"model": str(bases[base]), "lora_rank": 4, "lora_dropout": dropout}
        return create_engine(
            TrainConfig(engine=request.param, device="cpu", threads=1, weight_decay=0.1, **options)
        )

    return make


@pytest.fixture(scope="module")
def engine(make: Make) -> Engine:
    """For what is asked of a step before it is finished: it stays as it is."""
    return trained(make())


@pytest.fixture(scope="module")
def dropping(make: Make) -> Engine:
    """The same, with dropout."""
    return trained(make(dropout=0.3))


def trained(engine: Engine) -> Engine:
    """With an adapter that does something: its second half begins at zero."""
    for number in (1, 2):
        step(engine, [BATCH], number=number)
    return engine


def pass_through(engine: Engine, batches: Sequence[MicroBatch], *, number: int = 1) -> list[Losses]:
    """The micro-steps of a step."""
    tokens = sum(batch.tokens for batch in batches)
    made = []
    for micro_step, batch in enumerate(batches):
        engine.begin_micro_step(seed=7, step=number, micro_step=micro_step)
        made.append(engine.micro_step(batch, tokens=tokens))
    return made


def step(engine: Engine, batches: Sequence[MicroBatch], *, number: int = 1) -> tuple[list[float], float]:
    """A whole step; the examples' losses, and the gradient's norm before it was clipped."""
    made = pass_through(engine, batches, number=number)
    norm = engine.clip_gradients(1.0)
    engine.update(learning_rate=0.05)
    return [loss for losses in made for loss in losses.weighted.tolist()], norm


def norm_of(engine: Engine, *batches: MicroBatch) -> float:
    """Of the gradient of a step, which is not made."""
    pass_through(engine, batches)
    return engine.clip_gradients(0.0)


def digest(engine: Engine, folder: Path) -> str:
    """Of all bits of its state."""
    return save(engine, folder / "digest").inspect(2).state_digest


def save(engine: Engine, folder: Path) -> CheckpointManager:
    """Its state as that of step 2."""
    manager, state = CheckpointManager(folder), engine.state()
    manager.save(Checkpoint(step=2, model=state.model, optimizer=state.optimizer, rng=state.rng))
    return manager


def same(one: Losses, other: Losses) -> bool:
    """Bit for bit."""
    return np.array_equal(one.cross_entropy, other.cross_entropy) and np.array_equal(
        one.weighted, other.weighted
    )


def test_it_says_what_it_trains(make):
    engine = make()
    trained, all_of_them = engine.parameters
    assert trained == sum(math.prod(array.shape) for array in engine.state().model.values())
    assert 0 < trained < all_of_them


@few
@given(order=st.permutations(EXAMPLES), cut=st.integers(1, len(LENGTHS) - 1))
def test_gradients_add_up_over_micro_steps(engine, order, cut):
    whole = norm_of(engine, BATCH)
    assert norm_of(engine, some_of(BATCH, order[:cut]), some_of(BATCH, order[cut:])) == pytest.approx(
        whole, rel=1e-5
    )


def test_a_step_of_several_micro_steps_is_that_of_one(make):
    one, several = make(), make()
    for number in (1, 2, 3):
        step(one, [BATCH], number=number)
        step(several, [some_of(BATCH, [2]), some_of(BATCH, [0, 3]), some_of(BATCH, [1])], number=number)
    found, expected = several.evaluate(BATCH).cross_entropy, one.evaluate(BATCH).cross_entropy
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert abs(make().evaluate(BATCH).cross_entropy - expected).min() > 0.01  # it did learn


def test_the_first_micro_step_begins_without_gradients(engine):
    norm = norm_of(engine, BATCH)
    pass_through(engine, [BATCH, BATCH])  # of a step that was interrupted
    assert norm_of(engine, BATCH) == norm


def test_clipping(engine):
    norm = norm_of(engine, BATCH)
    assert engine.clip_gradients(0.0) == norm
    assert engine.clip_gradients(2 * norm) == norm
    assert engine.clip_gradients(norm / 2) == norm
    assert engine.clip_gradients(0.0) == pytest.approx(norm / 2, rel=1e-4)


@few
@given(
    weights=st.lists(st.floats(0.125, 8, width=32), min_size=len(LENGTHS), max_size=len(LENGTHS)),
    factor=st.floats(0.125, 8),
)
def test_weights_count(engine, weights, factor):
    batch = weighing(BATCH, weights)
    for losses in (*pass_through(engine, [batch]), engine.evaluate(batch)):
        np.testing.assert_allclose(losses.weighted, losses.cross_entropy * weights, rtol=1e-6)
    heavier = weighing(BATCH, np.multiply(weights, factor))
    assert norm_of(engine, heavier) == pytest.approx(factor * norm_of(engine, batch), rel=1e-5)


def test_weights_of_one_are_none(engine):
    losses = engine.evaluate(weighing(BATCH, np.ones(len(LENGTHS))))
    assert np.array_equal(losses.weighted, losses.cross_entropy)


def test_what_weighs_nothing_has_no_part_in_the_gradient(engine):
    light = weighing(BATCH, [1, 0, 2, 0])
    heavy = some_of(light, [0, 2])
    engine.begin_micro_step(seed=7, step=1, micro_step=0)
    engine.micro_step(heavy, tokens=light.tokens)
    assert engine.clip_gradients(0.0) == pytest.approx(norm_of(engine, light), rel=1e-5)


@few
@given(order=st.permutations(EXAMPLES), count=st.integers(1, len(LENGTHS)), filler=st.integers(0, 30))
def test_an_example_is_the_same_beside_any_other(engine, order, count, filler):
    """And whatever the padding is filled with."""
    rows = order[:count]
    batch = some_of(BATCH, rows, filler=filler)
    alone = np.array([engine.evaluate(some_of(BATCH, [row])).cross_entropy[0] for row in rows])
    for losses in (engine.evaluate(batch), *pass_through(engine, [batch])):
        np.testing.assert_allclose(losses.cross_entropy, alone, rtol=1e-5)


def test_the_gradient_is_the_slope_of_the_loss(make):
    """A small step down the slope lowers the weighted loss, and no other weighting's as much."""
    falls = {}
    for name, weights in {"first": [4, 0.1, 0.1, 0.1], "last": [0.1, 0.1, 0.1, 4]}.items():
        engine, batch = make(), weighing(BATCH, weights)
        before = engine.evaluate(BATCH).cross_entropy
        for number in range(1, 6):
            step(engine, [batch], number=number)
        falls[name] = before - engine.evaluate(BATCH).cross_entropy
    assert falls["first"][0] > falls["last"][0]
    assert falls["last"][3] > falls["first"][3]
    assert min(falls["first"][0], falls["last"][3]) > 0


@few
@given(seed=st.integers(0, 2**63 - 1), number=st.integers(1, 10**6), micro_step=st.integers(1, 99))
def test_what_is_drawn_depends_on_seed_step_and_micro_step_alone(dropping, seed, number, micro_step):
    def made(seed, number, micro_step):
        dropping.begin_micro_step(seed=seed, step=number, micro_step=micro_step)
        return dropping.micro_step(BATCH, tokens=BATCH.tokens)

    first = made(seed, number, micro_step)
    for other in ((seed ^ 1, number, micro_step), (seed, number + 1, micro_step), (seed, number, 0)):
        assert not same(made(*other), first)
    assert same(made(seed, number, micro_step), first)


def test_it_begins_the_same_whatever_was_drawn_before(make, dropping, tmp_path):
    first = digest(make(), tmp_path)
    pass_through(dropping, [BATCH], number=9)
    assert digest(make(), tmp_path) == first


def test_evaluation_changes_nothing(make, tmp_path):
    """Not even where it comes between the parts of a step; and nothing changes it but an update."""
    undisturbed = trained(make(dropout=0.3))
    (expected,) = pass_through(undisturbed, [BATCH])
    norm = undisturbed.clip_gradients(1.0)
    undisturbed.update(learning_rate=0.1)
    expected_digest = digest(undisturbed, tmp_path)

    engine = trained(make(dropout=0.3))
    engine.begin_micro_step(seed=7, step=1, micro_step=0)
    begun = digest(engine, tmp_path)
    first = engine.evaluate(BATCH)
    assert digest(engine, tmp_path) == begun
    assert same(engine.micro_step(BATCH, tokens=BATCH.tokens), expected)
    assert same(engine.evaluate(BATCH), first)
    assert engine.clip_gradients(1.0) == norm
    engine.evaluate(some_of(BATCH, [0]))
    engine.update(learning_rate=0.1)
    assert digest(engine, tmp_path) == expected_digest != begun


def test_evaluation_is_without_dropout(make, dropping):
    plain = make()
    plain.load_state(dropping.state())
    assert same(plain.evaluate(BATCH), dropping.evaluate(BATCH))


def test_a_state_goes_through_a_file_and_on_bit_for_bit(make, tmp_path):
    engine, fresh = trained(make(dropout=0.3)), make(dropout=0.3)
    manager = save(engine, tmp_path)
    step(fresh, [some_of(BATCH, [1, 2])], number=5)  # it has been elsewhere
    loaded = manager.load(2, framework=engine.framework)
    state = EngineState(loaded.model, loaded.optimizer, loaded.rng)
    fresh.load_state(state)
    assert digest(fresh, tmp_path) == digest(engine, tmp_path)
    for number in (3, 4):
        halves = [some_of(BATCH, [0, 1]), some_of(BATCH, [2, 3])]
        assert step(fresh, halves, number=number) == step(engine, halves, number=number)
    assert digest(fresh, tmp_path) == digest(engine, tmp_path)
    # What was loaded is the caller's: it did not train on.
    again = make()
    again.load_state(state)
    assert digest(again, tmp_path) == manager.inspect(2).state_digest


def _as(array: Any, dtype: str) -> Any:
    if isinstance(array, np.ndarray):
        return array.astype(dtype)
    kind = getattr(import_module(type(array).__module__.removesuffix("._C")), dtype)  # of torch or mlx.core
    return array.to(kind) if hasattr(array, "to") else array.astype(kind)


#: What is wrong with a state: given a name and its array, what stands there instead.
MISFITS: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "an array missing": lambda name, array: {},
    "an array too many": lambda name, array: {name: array, "another": array},
    "another name": lambda name, array: {f"{name}_": array},
    "another shape": lambda name, array: {name: array[1:]},
    "another dtype": lambda name, array: {name: _as(array, "int32")},
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(engine, tmp_path, misfit):
    state, before = engine.state(), digest(engine, tmp_path)
    name = max(state.model)
    others = {other: array for other, array in state.model.items() if other != name}
    wrong = {**others, **MISFITS[misfit](name, state.model[name])}
    with pytest.raises(ResumeRefused, match="the checkpoint does not fit the model") as refused:
        engine.load_state(replace(state, model=wrong))
    assert refused.value.differences
    assert digest(engine, tmp_path) == before


def moments_of(optimizer: Any) -> list[tuple[dict[Any, Any], Any]]:
    """Where each moment stands: a container of the state, and its key there."""
    if "state" in optimizer:
        return [(values, key) for values in optimizer["state"].values() for key in ("exp_avg", "exp_avg_sq")]
    return [(optimizer[moment], name) for moment in ("m", "v") for name in optimizer[moment]]


@pytest.mark.parametrize("make", ENGINES[1:], indirect=True)
@pytest.mark.parametrize(
    "misfit", [lambda array: array[1:], lambda array: array[:1, :1], lambda array: array.T]
)
def test_moments_of_another_shape_are_refused_and_change_nothing(make, tmp_path, misfit):
    """What is fused would read and write beyond them."""
    engine = trained(make())
    state, before = copy.deepcopy(engine.state()), digest(engine, tmp_path)
    for container, key in moments_of(state.optimizer):
        container[key] = misfit(container[key])
    with pytest.raises(ResumeRefused, match=r"the checkpoint does not fit the model:\n.*lora") as refused:
        engine.load_state(state)
    assert refused.value.differences
    assert digest(engine, tmp_path) == before


@pytest.mark.parametrize("make", ENGINES[1:], indirect=True)
@pytest.mark.parametrize("steps", ["x", -5, 1.5, float("nan"), [1]])
def test_a_number_of_steps_that_is_none_is_refused(make, tmp_path, steps):
    engine = trained(make())
    state, before = copy.deepcopy(engine.state()), digest(engine, tmp_path)
    for values in state.optimizer["state"].values() if "state" in state.optimizer else [state.optimizer]:
        values["step"] = steps
    with pytest.raises(ResumeRefused):
        engine.load_state(state)
    assert digest(engine, tmp_path) == before


@pytest.mark.parametrize("make", ENGINES[1:], indirect=True)
def test_weights_alone_are_taken_up_whatever_their_precision_and_the_rest_begins_anew(make, tmp_path):
    """As adapters of other programs have them: they are float32 from then on."""
    begun = trained(make()).state()
    narrow = {name: _as(array, "float16") for name, array in begun.model.items()}
    engine, wide = trained(make()), make()
    engine.load_state(EngineState(narrow, {}, {}))
    wide.load_state(replace(wide.state(), model={name: _as(a, "float32") for name, a in narrow.items()}))
    assert {str(array.dtype).split(".")[-1] for array in engine.state().model.values()} == {"float32"}
    assert step(engine, [BATCH]) == step(wide, [BATCH])
    assert digest(engine, tmp_path) == digest(wide, tmp_path)


def test_equal_weights_have_one_fingerprint(make):
    first, other, again = (make(base=base).fingerprint() for base in range(3))
    assert first == again != other
    assert trained(make()).fingerprint() == first


def test_what_is_not_finite_is_told(make):
    """A weight that is none, and a moment."""
    engine = trained(make())
    assert engine.is_finite()
    pass_through(engine, [BATCH])
    engine.update(learning_rate=math.nan)
    assert not engine.is_finite()
    heavy = make()
    with np.errstate(over="ignore"):
        pass_through(heavy, [weighing(BATCH, [1e25] * len(LENGTHS))])
        heavy.update(learning_rate=0.1)  # the second moment has no place for the square
    assert not heavy.is_finite()


@pytest.mark.parametrize("make", ENGINES[1:], indirect=True)
def test_closed_it_holds_nothing(make):
    gc.freeze()  # what was there before need not be searched
    engine = make()
    step(engine, [BATCH])
    model = weakref.ref(engine.model)
    engine.close()
    gc.collect()
    gc.unfreeze()
    assert model() is None
