"""The engine contract: one suite for the engines of torch and mlx, and for the toy engine.

Equal computations are compared bit for bit; sums in another order, to rounding.
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
from small_batches import LENGTHS, make_batch, select_examples, with_weights

from distrust import Checkpoint, CheckpointManager, TrainConfig
from distrust.contract import Engine, EngineState, Losses
from distrust.data import MicroBatch
from distrust.engines import create_engine
from distrust.errors import ResumeRefused
from distrust.testing.models import make_model
from distrust.testing.toy_engine import VOCABULARY, ToyEngine

Make = Callable[..., Engine]

BATCH = make_batch(vocabulary=VOCABULARY)
EXAMPLES = range(len(LENGTHS))
mlx_only = pytest.mark.skipif(find_spec("mlx_lm") is None, reason="mlx-lm is not installed")
ENGINES = ["toy", pytest.param("torch", marks=pytest.mark.device), pytest.param("mlx", marks=mlx_only)]
few = settings(max_examples=6)


@pytest.fixture(scope="module")
def bases(tiny_model, tmp_path_factory) -> list[Path]:
    """Folders of two models, and of a copy of the first."""
    folder = tmp_path_factory.mktemp("bases")
    return [tiny_model, make_model(folder / "other", seed=1), make_model(folder / "same", seed=0)]


@pytest.fixture(scope="module", params=ENGINES)
def make(request, bases, device) -> Make:
    """Factory of untrained engines: ``make(dropout=0.3, base=1, seed=1)``; toys have no seed."""

    def make(*, dropout: float = 0.0, base: int = 0, seed: int = 0) -> Engine:
        if request.param == "toy":
            return ToyEngine(base=base % 2, dropout=dropout)
        options = {"model": str(bases[base]), "lora_rank": 4, "lora_dropout": dropout, "seed": seed}
        options["dtype"] = "float32"  # on GPUs, too
        where = device if request.param == "torch" else "cpu"
        return create_engine(
            TrainConfig(engine=request.param, device=where, threads=1, weight_decay=0.1, **options)
        )

    return make


@pytest.fixture(scope="module")
def engine(make: Make) -> Engine:
    """A trained engine; tests that share it never finish a step, so its state stays the same."""
    return train_two_steps(make())


@pytest.fixture(scope="module")
def dropping(make: Make) -> Engine:
    """Like ``engine``, with dropout."""
    return train_two_steps(make(dropout=0.3))


def train_two_steps(engine: Engine) -> Engine:
    """Train two steps: LoRA's second matrix starts at zero."""
    for number in (1, 2):
        step(engine, [BATCH], number=number)
    return engine


def pass_through(engine: Engine, batches: Sequence[MicroBatch], *, number: int = 1) -> list[Losses]:
    """Forward and backward of a step's micro-batches, without the update."""
    tokens = sum(batch.tokens for batch in batches)
    losses = []
    for micro_step, batch in enumerate(batches):
        engine.begin_micro_step(seed=7, step=number, micro_step=micro_step)
        losses.append(engine.micro_step(batch, tokens=tokens))
    return losses


def step(engine: Engine, batches: Sequence[MicroBatch], *, number: int = 1) -> tuple[list[float], float]:
    """A complete step: the examples' losses, and the gradient norm before clipping."""
    passes = pass_through(engine, batches, number=number)
    norm = engine.clip_gradients(1.0)
    engine.update(learning_rate=0.05)
    return [loss for losses in passes for loss in losses.weighted.tolist()], norm


def norm_of(engine: Engine, *batches: MicroBatch) -> float:
    """Gradient norm of a step without its update."""
    pass_through(engine, batches)
    return engine.clip_gradients(0.0)


def digest(engine: Engine, folder: Path) -> str:
    """State digest of an engine."""
    return save(engine, folder / "digest").inspect(2).state_digest


def save(engine: Engine, folder: Path) -> CheckpointManager:
    """Save the engine's state as a checkpoint of step 2."""
    manager, state = CheckpointManager(folder), engine.state()
    manager.save(Checkpoint(step=2, model=state.model, optimizer=state.optimizer, rng=state.rng))
    return manager


def same(one: Losses, other: Losses) -> bool:
    """Whether losses are equal bit for bit."""
    pairs = (one.cross_entropy, other.cross_entropy), (one.weighted, other.weighted)
    return all(np.array_equal(*pair) for pair in pairs)


def test_parameters_counts_trained_weights(make):
    engine = make()
    trained, total = engine.parameters
    assert trained == sum(math.prod(array.shape) for array in engine.state().model.values())
    assert 0 < trained < total


@few
@given(order=st.permutations(EXAMPLES), cut=st.integers(1, len(LENGTHS) - 1))
def test_gradients_add_up_over_micro_steps(engine, order, cut):
    norm = norm_of(engine, BATCH)
    parts = select_examples(BATCH, order[:cut]), select_examples(BATCH, order[cut:])
    assert norm_of(engine, *parts) == pytest.approx(norm, rel=1e-5)


def test_a_step_of_several_micro_steps_equals_one_of_a_single_micro_step(make):
    one, several = make(), make()
    parts = [select_examples(BATCH, rows) for rows in ([2], [0, 3], [1])]
    for number in (1, 2, 3):
        step(one, [BATCH], number=number)
        step(several, parts, number=number)
    actual, expected = several.evaluate(BATCH).cross_entropy, one.evaluate(BATCH).cross_entropy
    np.testing.assert_allclose(actual, expected, rtol=1e-3)
    assert abs(make().evaluate(BATCH).cross_entropy - expected).min() > 0.01  # training changed the losses


def test_the_first_micro_step_clears_gradients(engine):
    norm = norm_of(engine, BATCH)
    pass_through(engine, [BATCH, BATCH])  # of a step that was interrupted
    assert norm_of(engine, BATCH) == norm


def test_each_step_has_the_learning_rate_that_it_is_given(make):
    engine = make()
    untrained = engine.evaluate(BATCH)
    for rate, is_unchanged in ((0.0, True), (0.05, False)):
        pass_through(engine, [BATCH])
        engine.update(learning_rate=rate)
        assert same(engine.evaluate(BATCH), untrained) == is_unchanged


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
def test_losses_and_gradients_scale_with_weights(engine, weights, factor):
    batch = with_weights(BATCH, weights)
    for losses in (*pass_through(engine, [batch]), engine.evaluate(batch)):
        np.testing.assert_allclose(losses.weighted, losses.cross_entropy * weights, rtol=1e-6)
    heavier = with_weights(BATCH, np.multiply(weights, factor))
    assert norm_of(engine, heavier) == pytest.approx(factor * norm_of(engine, batch), rel=1e-5)


def test_weights_of_one_change_nothing(engine):
    losses = engine.evaluate(with_weights(BATCH, np.ones(len(LENGTHS))))
    assert np.array_equal(losses.weighted, losses.cross_entropy)


def test_zero_weight_examples_do_not_contribute_to_the_gradient(engine):
    light = with_weights(BATCH, [1, 0, 2, 0])
    heavy = select_examples(light, [0, 2])
    engine.begin_micro_step(seed=7, step=1, micro_step=0)
    engine.micro_step(heavy, tokens=light.tokens)
    assert engine.clip_gradients(0.0) == pytest.approx(norm_of(engine, light), rel=1e-5)


@few
@given(order=st.permutations(EXAMPLES), count=st.integers(1, len(LENGTHS)))
def test_an_examples_loss_does_not_depend_on_the_batch(engine, order, count):
    rows = order[:count]
    batch = select_examples(BATCH, rows)
    alone = np.array([engine.evaluate(select_examples(BATCH, [row])).cross_entropy[0] for row in rows])
    for losses in (engine.evaluate(batch), *pass_through(engine, [batch])):
        np.testing.assert_allclose(losses.cross_entropy, alone, rtol=1e-5)


def test_training_lowers_the_loss_of_heavy_examples(make):
    """Steps along the gradient lower the heavy example's loss more than another weighting does."""
    falls = {}
    for name, weights in {"first": [4, 0.1, 0.1, 0.1], "last": [0.1, 0.1, 0.1, 4]}.items():
        engine, batch = make(), with_weights(BATCH, weights)
        initial = engine.evaluate(BATCH).cross_entropy
        for number in range(1, 6):
            step(engine, [batch], number=number)
        falls[name] = initial - engine.evaluate(BATCH).cross_entropy
    assert falls["first"][0] > falls["last"][0]
    assert falls["last"][3] > falls["first"][3]
    assert min(falls["first"][0], falls["last"][3]) > 0


@few
@given(seed=st.integers(0, 2**63 - 1), number=st.integers(1, 10**6), micro_step=st.integers(1, 99))
def test_dropout_depends_on_seed_step_and_micro_step_only(dropping, seed, number, micro_step):
    def losses_of(seed, number, micro_step):
        dropping.begin_micro_step(seed=seed, step=number, micro_step=micro_step)
        return dropping.micro_step(BATCH, tokens=BATCH.tokens)

    first = losses_of(seed, number, micro_step)
    for variant in ((seed ^ 1, number, micro_step), (seed, number + 1, micro_step), (seed, number, 0)):
        assert not same(losses_of(*variant), first)
    assert same(losses_of(seed, number, micro_step), first)


def test_initialization_does_not_depend_on_earlier_random_draws(make, dropping, tmp_path):
    first = digest(make(), tmp_path)
    pass_through(dropping, [BATCH], number=9)
    assert digest(make(), tmp_path) == first


@pytest.mark.parametrize("make", ENGINES[1:], indirect=True)
def test_an_adapter_is_initialized_from_the_seed(make, tmp_path):
    digests = {digest(make(seed=seed), tmp_path) for seed in (0, 1)}
    assert len(digests) == 2


def test_evaluation_changes_nothing(make, tmp_path):
    """Not even between the parts of a step; only an update changes the state."""
    undisturbed = train_two_steps(make(dropout=0.3))
    (expected,) = pass_through(undisturbed, [BATCH])
    norm = undisturbed.clip_gradients(1.0)
    undisturbed.update(learning_rate=0.1)
    expected_digest = digest(undisturbed, tmp_path)

    engine = train_two_steps(make(dropout=0.3))
    engine.begin_micro_step(seed=7, step=1, micro_step=0)
    initial = digest(engine, tmp_path)
    first = engine.evaluate(BATCH)
    assert digest(engine, tmp_path) == initial
    assert same(engine.micro_step(BATCH, tokens=BATCH.tokens), expected)
    assert same(engine.evaluate(BATCH), first)
    assert engine.clip_gradients(1.0) == norm
    engine.evaluate(select_examples(BATCH, [0]))
    engine.update(learning_rate=0.1)
    assert digest(engine, tmp_path) == expected_digest != initial


def test_evaluation_has_no_dropout(make, dropping):
    plain = make()
    plain.load_state(dropping.state())
    assert same(plain.evaluate(BATCH), dropping.evaluate(BATCH))


def test_a_saved_state_resumes_bit_for_bit(make, tmp_path):
    engine, fresh = train_two_steps(make(dropout=0.3)), make(dropout=0.3)
    manager = save(engine, tmp_path)
    step(fresh, [select_examples(BATCH, [1, 2])], number=5)  # its state differs now
    loaded = manager.load(2, framework=engine.framework)
    state = EngineState(loaded.model, loaded.optimizer, loaded.rng)
    fresh.load_state(state)
    assert digest(fresh, tmp_path) == digest(engine, tmp_path)
    for number in (3, 4):
        halves = [select_examples(BATCH, [0, 1]), select_examples(BATCH, [2, 3])]
        assert step(fresh, halves, number=number) == step(engine, halves, number=number)
    assert digest(fresh, tmp_path) == digest(engine, tmp_path)
    # Training on did not change the arrays that the caller loaded.
    again = make()
    again.load_state(state)
    assert digest(again, tmp_path) == manager.inspect(2).state_digest


def _cast(array: Any, dtype: str) -> Any:
    if isinstance(array, np.ndarray):
        return array.astype(dtype)
    kind = getattr(import_module(type(array).__module__.removesuffix("._C")), dtype)  # of torch or mlx.core
    return array.to(kind) if hasattr(array, "to") else array.astype(kind)


#: Defects of a state: (name, array) -> what replaces that entry.
MISFITS: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "an array missing": lambda name, array: {},
    "an array too many": lambda name, array: {name: array, "another": array},
    "another name": lambda name, array: {f"{name}_": array},
    "another shape": lambda name, array: {name: array[1:]},
    "another dtype": lambda name, array: {name: _cast(array, "int32")},
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_mismatching_state_is_refused_and_changes_nothing(engine, tmp_path, misfit):
    state, digest_before = engine.state(), digest(engine, tmp_path)
    name = max(state.model)
    unchanged = {key: array for key, array in state.model.items() if key != name}
    wrong = {**unchanged, **MISFITS[misfit](name, state.model[name])}
    with pytest.raises(ResumeRefused, match="the checkpoint does not fit the model") as refused:
        engine.load_state(replace(state, model=wrong))
    assert refused.value.differences
    assert digest(engine, tmp_path) == digest_before


def moments_of(optimizer: Any) -> list[tuple[dict[Any, Any], Any]]:
    """The container and key of each moment in an optimizer's state."""
    if "state" in optimizer:
        return [(values, key) for values in optimizer["state"].values() for key in ("exp_avg", "exp_avg_sq")]
    return [(optimizer[moment], name) for moment in ("m", "v") for name in optimizer[moment]]


@pytest.mark.parametrize("make", ENGINES[1:], indirect=True)
@pytest.mark.parametrize(
    "misfit", [lambda array: array[1:], lambda array: array[:1, :1], lambda array: array.T]
)
def test_moments_of_another_shape_are_refused_and_change_nothing(engine, tmp_path, misfit):
    """The fused kernel would read and write out of bounds."""
    state, digest_before = copy.deepcopy(engine.state()), digest(engine, tmp_path)
    for container, key in moments_of(state.optimizer):
        container[key] = misfit(container[key])
    with pytest.raises(ResumeRefused, match=r"the checkpoint does not fit the model:\n.*lora") as refused:
        engine.load_state(state)
    assert refused.value.differences
    assert digest(engine, tmp_path) == digest_before


@pytest.mark.parametrize("make", ENGINES[1:], indirect=True)
@pytest.mark.parametrize("steps", ["x", -5, 1.5, float("nan"), [1]])
def test_an_invalid_step_count_is_refused(engine, tmp_path, steps):
    state, digest_before = copy.deepcopy(engine.state()), digest(engine, tmp_path)
    for values in state.optimizer["state"].values() if "state" in state.optimizer else [state.optimizer]:
        values["step"] = steps
    with pytest.raises(ResumeRefused):
        engine.load_state(state)
    assert digest(engine, tmp_path) == digest_before


@pytest.mark.parametrize("make", ENGINES[1:], indirect=True)
def test_weights_alone_load_in_any_precision_and_reset_the_optimizer(make, engine, tmp_path):
    """As in adapters of other programs: they become float32."""
    narrow = {name: _cast(array, "float16") for name, array in engine.state().model.items()}
    trained, wide = train_two_steps(make()), make()
    trained.load_state(EngineState(narrow, {}, {}))
    wide.load_state(replace(wide.state(), model={name: _cast(a, "float32") for name, a in narrow.items()}))
    assert {str(array.dtype).split(".")[-1] for array in trained.state().model.values()} == {"float32"}
    assert step(trained, [BATCH]) == step(wide, [BATCH])
    assert digest(trained, tmp_path) == digest(wide, tmp_path)


def test_equal_weights_have_one_fingerprint(make, engine):
    first, different, again = (make(base=base).fingerprint() for base in range(3))
    assert first == again != different
    assert engine.fingerprint() == first


def test_is_finite_detects_weights_and_moments(make, engine):
    """In a weight, and in a moment."""
    assert engine.is_finite()
    broken = make()
    pass_through(broken, [BATCH])
    broken.update(learning_rate=math.nan)
    assert not broken.is_finite()
    heavy = make()
    with np.errstate(over="ignore"):
        pass_through(heavy, [with_weights(BATCH, [1e25] * len(LENGTHS))])
        heavy.update(learning_rate=0.1)  # the square overflows the second moment
    assert not heavy.is_finite()


@pytest.mark.parametrize("make", ENGINES[1:], indirect=True)
def test_close_releases_the_model(make):
    gc.freeze()  # exclude older objects from collection: faster
    engine = make()
    step(engine, [BATCH])
    model = weakref.ref(engine.model)
    engine.close()
    gc.collect()
    gc.unfreeze()
    assert model() is None
