"""A loaded checkpoint is bit-identical to the saved one: every dtype, layout, tree and scalar."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from states import (
    DTYPES,
    FRAMEWORKS,
    NUMPY_DTYPES,
    as_tensor,
    ml_dtypes,
    requires_ml_dtypes,
    requires_torch,
    torch,
)

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint.tree import STATE_SECTIONS
from distrust.errors import UnsupportedState

pytestmark = pytest.mark.usefixtures("no_fsync")
on_both_paths = pytest.mark.usefixtures("write_path")

NUMPY_LAYOUTS = {
    "plain": lambda a: a,
    "transposed": lambda a: a.transpose(2, 0, 1),
    "strided": lambda a: a[:, ::2, 1::3],
    "reversed": lambda a: a[::-1, :, ::-1],
    "expanded": lambda a: np.broadcast_to(a[0, 0], (3, 2, 6)),
    "offset": lambda a: a[1, 1:],
    "zero-size": lambda a: a[:, :0],
    "zero-dimensional": lambda a: a[0, 0, 0:1].reshape(()),
    "fortran": np.asfortranarray,
    "big-endian": lambda a: a.byteswap().view(a.dtype.newbyteorder(">")),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype),
}
TORCH_LAYOUTS = {
    "plain": lambda t: t,
    "transposed": lambda t: t.permute(2, 0, 1),
    "strided": lambda t: t[:, ::2, 1::3],
    "expanded": lambda t: t[0, 0].expand(3, 2, 6),
    "offset": lambda t: t[1, 1:],
    "zero-size": lambda t: t[:, :0],
    "zero-dimensional": lambda t: t[0, 0, 0],
}


def random_array(dtype: np.dtype, seed: int = 7) -> np.ndarray:
    """Random bits, including NaNs with payloads, infinities, denormals and negative zeros."""
    raw = np.random.default_rng(seed).integers(0, 256, 2 * 4 * 6 * dtype.itemsize, np.uint8)
    return (raw & 1 if dtype.kind == "b" else raw).view(dtype).reshape(2, 4, 6)


def torch_tensor(dtype: np.dtype) -> torch.Tensor:
    raw = torch.from_numpy(random_array(dtype).view(np.uint8))
    return raw.view(getattr(torch, dtype.name))


def bits(array: np.ndarray | torch.Tensor) -> bytes:
    """An array's bytes in C order, little-endian."""
    if torch is not None and isinstance(array, torch.Tensor):
        items = [array[index] for index in np.ndindex(*array.shape)]
        return b"".join(bytes(item.detach().reshape(1).clone().view(torch.uint8).tolist()) for item in items)
    return (array.byteswap() if array.dtype.byteorder == ">" else array).tobytes()


def is_identical(a: Any, b: Any) -> bool:
    """Return whether two trees are equal in every type, key and bit."""
    if isinstance(a, np.ndarray):
        return (
            type(b) is np.ndarray
            and a.dtype.name == b.dtype.name
            and a.shape == b.shape
            and bits(a) == bits(b)
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        typed = [{(type(key), repr(key)): value for key, value in tree.items()} for tree in (a, b)]
        return typed[0].keys() == typed[1].keys() and all(
            is_identical(typed[0][key], typed[1][key]) for key in typed[0]
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_identical, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)
    return a == b


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    with CheckpointManager(tmp_path_factory.mktemp("round-trip"), keep_last=1) as manager:
        yield manager


def round_trip(manager: CheckpointManager, framework: str = "numpy", **sections: Any) -> Checkpoint:
    manager.save(Checkpoint(step=1, **sections))
    return manager.load(1, framework=framework)


@on_both_paths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy_array_of_any_layout_is_restored_exactly(manager, dtype):
    arrays = {name: view(random_array(dtype)) for name, view in NUMPY_LAYOUTS.items()}

    loaded = round_trip(manager, model=arrays).model

    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (name, loaded[name].dtype.name, loaded[name].shape) == (name, dtype.name, array.shape)
        assert bits(loaded[name]) == bits(array), name
        assert loaded[name].flags.writeable


@requires_torch
@on_both_paths
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_tensor_of_any_layout_is_restored_exactly(manager, dtype):
    tensors = {name: view(torch_tensor(dtype)) for name, view in TORCH_LAYOUTS.items()}

    loaded = round_trip(manager, framework="torch", model=tensors).model

    for name, tensor in tensors.items():
        assert (name, loaded[name].dtype, loaded[name].shape) == (name, tensor.dtype, tensor.shape)
        assert bits(loaded[name]) == bits(tensor), name


@requires_torch
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_array_of_one_framework_loads_into_another(manager, dtype):
    from_torch = round_trip(manager, model={"w": torch_tensor(dtype)}).model["w"]
    assert is_identical(from_torch, random_array(dtype))

    from_numpy = round_trip(manager, framework="torch", model={"w": random_array(dtype)}).model["w"]
    assert from_numpy.dtype == torch_tensor(dtype).dtype
    assert bits(from_numpy) == bits(torch_tensor(dtype))


@requires_torch
@on_both_paths
def test_conjugate_and_negative_torch_tensors_are_resolved(manager):
    """Conjugation and negation are flags of a view, not in its bytes."""
    z = torch.tensor([[1 + 2j, 3 - 4j], [5j, -6]], dtype=torch.complex64)
    lazy = {
        "conj": z.conj(),
        "adjoint": z.mH,
        "neg": z.conj().imag,
        "parameter": torch.nn.Parameter(z.real.clone()),
    }
    assert lazy["conj"].is_conj()
    assert lazy["neg"].is_neg()

    loaded = round_trip(manager, framework="torch", model=lazy).model

    for name, tensor in lazy.items():
        assert loaded[name].tolist() == tensor.tolist(), name


HOSTILE_NAMES = ["", ".", "..", "../x", "/etc/passwd", "a.b", "a", "b", "a~1", "0", "s0", "\0", "é",
                 "e\u0301", "😀", "__metadata__", "x" * 3000, '"', "\\", "\n", " ", "d", "null"]  # fmt: skip
text = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(HOSTILE_NAMES)
keys = text | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none()
scalars = st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats() | text
arrays = hnp.arrays(
    st.sampled_from(NUMPY_DTYPES[1:]), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
)


def trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[Any, Any]]:
    def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        lists = st.lists(inner, max_size=3)
        return lists | lists.map(tuple) | st.dictionaries(keys, inner, max_size=4)

    return st.dictionaries(keys, st.recursive(leaves, containers, max_leaves=12), max_size=5)


x, y, z = (np.arange(n, dtype=np.float32) for n in (1, 2, 3))


@settings(max_examples=100)
@given(trees(arrays | scalars), trees(arrays | scalars), trees(scalars))
@example({"a.b": x, "a": {"b": y, "b~1": z}, "a.b~1": x}, {0: x, "0": y, "False": z}, {})
@example({"": x, ".": {"": y}, "../x": z}, {"": {"": {"": x}}}, {"": {"": ""}})
@example({None: x, "None": y, 1.5: z, "1.5": x}, {True: x, "True": y}, {-1: 0, "-1": 1, -1.5: 2, math.nan: 3})
@example({"w": [x, (y, [z])]}, {"d": {"a": "model.w"}, "a": "model.w"}, {"a": "model.w", "l": [], "t": ()})
@example(dict.fromkeys(HOSTILE_NAMES, x), {}, {name: name for name in HOSTILE_NAMES})
def test_any_tree_is_restored_exactly(manager, model, optimizer, metadata):
    """A file has the same bytes on either path: ``test_write_paths``."""
    loaded = round_trip(manager, model=model, optimizer=optimizer, metadata=metadata, config=metadata)

    assert is_identical(loaded.model, model)
    assert is_identical(loaded.optimizer, optimizer)
    assert is_identical(loaded.metadata, metadata)
    assert is_identical(loaded.config, metadata)
    assert (loaded.rng, loaded.history) == ({}, {})
    manager.validate(1)
    names = [tensor.name for tensor in manager.inspect(1).tensors]
    assert len(names) == len(set(names))


def test_metadata_is_restored_exactly(manager):
    metadata = {
        "nested": {"deep": [{"er": ({}, [], ())}]},
        "unicode": "naïve 漢字 😀 \0 \u2028",
        "numbers": [
            math.inf,
            -math.inf,
            math.nan,
            -0.0,
            0.0,
            5e-324,
            0.1,
            2**63,
            -(2**64) - 1,
            10**400,
            1e16,
        ],
        "like ints": [1, 1.0, True, "1"],
        1: "int key",
        (1 << 70): "large int key",
    }

    loaded = round_trip(
        manager, metadata=metadata, metrics={"loss": 0.1, "worst": math.inf}, run={"a": [1, None]}
    )

    assert is_identical(loaded.metadata, metadata)
    assert loaded.metrics == {"loss": 0.1, "worst": math.inf}
    assert loaded.run == {"a": [1, None]}


@on_both_paths
def test_loaded_checkpoint_saved_again_has_the_same_digest(manager):
    manager.save(Checkpoint(step=1, model={"w": x}, metadata={"n": 10**400, "loss": 2}, metrics={"m": 1}))
    first = manager.inspect(1).state_digest

    manager.save(manager.load(1))

    assert manager.inspect(1).state_digest == first
    assert manager.load(1).metrics == {"m": 1.0}


def test_numpy_scalars_become_zero_dimensional_arrays(manager):
    loaded = round_trip(manager, model={"a": np.float32(1.5), "b": np.bool_(True)}).model

    assert is_identical(loaded, {"a": np.array(1.5, np.float32), "b": np.array(True)})


def test_deepest_tree_that_can_be_saved_can_be_loaded(manager):
    def make_nested(levels: int) -> dict[str, Any]:
        tree: Any = x
        for _ in range(levels):
            tree = {"k": [tree]}
        return {"k": tree}

    accepted = 0
    for levels in range(40, 70):
        try:
            loaded = round_trip(manager, model=make_nested(levels))
        except UnsupportedState:
            break
        assert is_identical(loaded.model, make_nested(levels))
        accepted = levels
    else:
        pytest.fail("no depth was rejected")
    assert accepted


def make_deep_list() -> Any:
    tree: Any = 0
    for _ in range(200_000):
        tree = [tree]
    return tree


def make_subclass() -> Any:
    """Like a quantized weight, which holds more than its bytes."""
    return type("Weight", (torch.nn.Parameter,), {})(torch.zeros(1))


UNSUPPORTED: dict[str, Any] = {
    "object": lambda: {"x": object()},
    "bytes": lambda: {"x": b"x"},
    "set": lambda: {"x": {1}},
    "tuple as key": lambda: {(1, 2): x},
    "bytes as key": lambda: {b"x": x},
    "numpy key": lambda: {np.int64(1): x},
    "two NaN keys": lambda: {float("nan"): 1, float("nan"): 2},
    "surrogate": lambda: {"x": "\ud800"},
    "surrogate in a key": lambda: {"\udfff": x},
    "huge int": lambda: {"x": 10**5000},
    "huge int as key": lambda: {10**5000: 1},
    "too deep": lambda: {"x": make_deep_list()},
    "text array": lambda: {"x": np.array(["a"])},
    "object array": lambda: {"x": np.array([None])},
    "dates": lambda: {"x": np.zeros(1, "M8[s]")},
    "record array": lambda: {"x": np.zeros(1, "i4,f4")},
    "masked array": lambda: {"x": np.ma.masked_array([1.0, 2.0], [True, False])},
    "long double": lambda: {"x": np.zeros(1, np.longdouble)},
    "complex128": lambda: {"x": np.zeros(1, np.complex128)},
    "int4": lambda: {"x": np.zeros(2, ml_dtypes.int4)},
    "sparse": lambda: {"x": torch.eye(2).to_sparse()},
    "torch complex128": lambda: {"x": torch.zeros(1, dtype=torch.complex128)},
    "meta": lambda: {"x": torch.zeros(1, device="meta")},
    "subclass": lambda: {"x": make_subclass()},
    "65 dimensions": lambda: {"x": torch.zeros([1] * 65)},
    "more JSON than a reader accepts": lambda: {"x": "x" * 100_000_000},
}


#: Case -> what it needs in addition to numpy.
REQUIREMENTS = {
    "int4": requires_ml_dtypes,
    **dict.fromkeys(["sparse", "torch complex128", "meta", "subclass", "65 dimensions"], requires_torch),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=REQUIREMENTS.get(case, ())) for case in UNSUPPORTED]
)
def test_value_that_cannot_be_restored_exactly_is_rejected_and_nothing_is_written(tmp_path, case):
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(UnsupportedState) as caught:
            manager.save(Checkpoint(step=1, model=UNSUPPORTED[case]()))
        assert caught.value.label
        assert len(str(caught.value).splitlines()) == 1
        str(caught.value).encode()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("section", ["metadata", "config"])
@pytest.mark.parametrize("value", [x, np.float32(1), as_tensor(x)], ids=["array", "scalar", "tensor"])
def test_arrays_in_plain_sections_are_rejected(manager, section, value):
    with pytest.raises(UnsupportedState, match=section):
        manager.save(Checkpoint(step=1, **{section: {"x": value}}))


@pytest.mark.parametrize("step", [-1, True, 1.0, "1", None, 10**18])
def test_step_must_be_an_integer(step):
    with pytest.raises(UnsupportedState, match="step"):
        Checkpoint(step=step)


@pytest.mark.parametrize("section", [*STATE_SECTIONS, "metrics", "run"])
@pytest.mark.parametrize("value", [None, [x], x], ids=["None", "list", "array"])
def test_section_must_be_a_dict(section, value):
    with pytest.raises(UnsupportedState, match=section):
        Checkpoint(step=1, **{section: value})


@pytest.mark.parametrize(
    "sections",
    [
        {"metrics": {"a": None}},
        {"metrics": {"a": "high"}},
        {"metrics": {"a": 10**400}},
        {"run": {"a": {1}}},
        {"run": {"a": "\ud800"}},
        {"run": {"a": 10**5000}},
    ],
)
def test_metrics_must_be_numbers_and_run_plain_json(manager, sections):
    with pytest.raises(UnsupportedState):
        manager.save(Checkpoint(step=1, **sections))


@on_both_paths
def test_steps_with_any_number_of_digits(tmp_path):
    steps = [0, 1, 9, 10, 99, 10**17, 10**18 - 1]
    with CheckpointManager(tmp_path, keep_last=None) as manager:
        for step in reversed(steps):
            manager.save(Checkpoint(step=step, model={"w": x}))
        assert manager.list_checkpoints() == steps
        assert [manager.load(step).step for step in steps] == steps


MEMORY = """
import os, subprocess, sys
import numpy as np
from distrust import Checkpoint, CheckpointManager

framework = sys.argv[2]
manager = CheckpointManager(sys.argv[1])
manager.save(Checkpoint(step=1, model={"w": np.ones(4 << 20, np.float64)}))

def resident():
    return 1024 * int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())]))

def load():
    loaded = manager.load(1, framework=framework)
    assert loaded.model["w"][-1] == 1
    return loaded

loaded = load()
initial = resident()
for _ in range(4):
    del loaded
    loaded = load()
print(resident() - initial)
alive = [load() for _ in range(3)]
print(resident() - initial)
"""


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_memory_is_released_on_reload(tmp_path, run_python, forked_python, framework):
    process = run_python(MEMORY, tmp_path, framework, python=forked_python)

    assert process.returncode == 0, process.stderr
    reloaded, referenced = map(int, process.stdout.split())
    assert reloaded < 16 << 20
    assert referenced > 64 << 20  # checks the measurement: arrays of 32 MiB that are referenced are visible
