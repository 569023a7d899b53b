"""jax and mlx arrays are saved and loaded exactly, without a copy, or rejected if the format lacks them.

Each check runs in a process of its own: a process that imported jax gets a warning at every later fork.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

FRAMEWORKS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not (find_spec(name) and find_spec("ml_dtypes")), reason=f"{name} and ml_dtypes are not installed"
        ),
    )
    for name in ("jax", "mlx")
]
jax_only, mlx_only = ([parameter] for parameter in FRAMEWORKS)

#: The start of every check. ``array`` converts a numpy array, ``with_layout`` also applies a layout (in numpy
#: for jax, which has only one layout), and ``bits`` returns the bytes.
PRELUDES = {
    "jax": """
import ml_dtypes, numpy as np, jax, jax.numpy as xp
jax.config.update("jax_enable_x64", True)

LACKING = set()
array = jax.device_put
with_layout = lambda layout, host: array(layout(host))
bits = lambda a: np.asarray(a).tobytes()
name = lambda a: a.dtype.name
""",
    "mlx": """
import ml_dtypes, numpy as np, mlx.core as mx, mlx.core as xp

LACKING = {"float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"}
CARRIERS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
bits = lambda a: np.array(mx.view(a, CARRIERS[a.itemsize])).tobytes()
name = lambda a: str(a.dtype).split(".")[-1]

def array(host):
    kind = getattr(mx, {"bool": "bool_"}.get(host.dtype.name, host.dtype.name))
    return mx.view(mx.array(host.view(f"u{host.itemsize}")), kind)

with_layout = lambda layout, host: layout(array(host))
""",
}
COMMON = """
import sys, threading, warnings
warnings.filterwarnings("error", module=r"__main__$|distrust\b")
from distrust import Checkpoint, CheckpointManager
from distrust.errors import ConfigError, UnsupportedState

framework, directory = sys.argv[1:]
manager = CheckpointManager(directory, keep_last=None)
NAMES = ["bool", "uint8", "int8", "uint16", "int16", "float16", "uint32", "int32", "float32", "uint64",
         "int64", "float64", "complex64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu",
         "float8_e4m3fnuz", "float8_e5m2fnuz"]

def random_array(name):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    raw = np.random.default_rng(7).integers(0, 256, 2 * 4 * 6 * dtype.itemsize, np.uint8)
    return (raw & 1 if name == "bool" else raw).view(dtype).reshape(2, 4, 6)
"""


@pytest.fixture
def check(run_python, forked_jax, forked_python, tmp_path):
    """Run a program for a framework and return its output; its warnings are errors."""

    def run(framework: str, code: str) -> str:
        process = run_python(
            PRELUDES[framework] + COMMON + code,
            framework,
            tmp_path,
            JAX_PLATFORMS="cpu",
            python=forked_jax if framework == "jax" else forked_python,
            XLA_FLAGS="--xla_force_host_platform_device_count=2",
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    return run


ROUND_TRIP = """
LAYOUTS = {
    "plain": lambda a: a,
    "transposed": lambda a: a.transpose(2, 0, 1),
    "strided": lambda a: a[:, ::2, 1::3],
    "reversed": lambda a: a[::-1],
    "expanded": lambda a: (np if isinstance(a, np.ndarray) else xp).broadcast_to(a[0, 0], (3, 2, 6)),
    "offset": lambda a: a[1, 1:],
    "zero-size": lambda a: a[:, :0],
    "zero-dimensional": lambda a: a[0, 0, 0:1].reshape(()),
}
hosts = {dtype: random_array(dtype) for dtype in NAMES if dtype not in LACKING}
saved = {
    dtype: {kind: with_layout(layout, host) for kind, layout in LAYOUTS.items()}
    for dtype, host in hosts.items()
}
if framework == "jax":
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("d",)), PartitionSpec("d"))
    for dtype, arrays in saved.items():
        arrays["sharded"] = jax.device_put(arrays["plain"], sharding)
manager.save(Checkpoint(step=1, model=saved))

for options in ({}, {"mmap": True}, {"mmap": True, "verify": "lazy"}):
    loaded = manager.load(1, framework=framework, **options).model
    for dtype, arrays in saved.items():
        for kind, a in arrays.items():
            b = loaded[dtype][kind]
            assert type(b) is type(a) and (name(b), b.shape) == (name(a), a.shape), (dtype, kind)
            assert bits(b) == bits(a), (dtype, kind)
for dtype, arrays in manager.load(1).model.items():
    assert arrays["plain"].tobytes() == hosts[dtype].tobytes(), dtype
    for kind, a in arrays.items():
        assert (a.dtype.name, a.shape) == (dtype, tuple(saved[dtype][kind].shape)), (dtype, kind)
        assert a.tobytes() == bits(saved[dtype][kind]), (dtype, kind)

first = manager.inspect(1).state_digest
manager.save(manager.load(1, framework=framework))
assert manager.inspect(1).state_digest == first
manager.save(Checkpoint(step=2, model={"w": hosts["float32"]}))
assert bits(manager.load(2, framework=framework).model["w"]) == hosts["float32"].tobytes()
print(len(hosts))
"""


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_array_of_any_dtype_and_layout_is_restored_exactly(check, framework):
    assert check(framework, ROUND_TRIP) == {"jax": "19\n", "mlx": "14\n"}[framework]


#: No background thread runs before ``go`` is set: whatever it reads, it reads after the changes.
DELAYED_THREADS = """
go = threading.Event()
go.set()
original = threading.Thread.run
threading.Thread.run = lambda thread: (go.wait(30), original(thread))
"""
INDEPENDENT = """
SIZE = 1 << 18
DTYPES = ["float32", "bfloat16", "uint8", "uint16", "uint32", "uint64", "bool"]
for step, save in enumerate(
    [manager.save, manager.save_async, lambda state: manager.save_async(state, overlap=True)]
):
    ones = {dtype: xp.ones(SIZE, dtype=getattr(xp, dtype, xp.bool_)) for dtype in DTYPES}
    views = {"transposed": ones["float32"].reshape(512, 512).T, "part": ones["float32"][8:]}
    moments, scalar = [xp.ones((8, 8)), xp.ones((4, 2)).T], array(np.array(1, np.int32))
    history, generator = np.ones(SIZE), np.ones(624, np.uint32)
    references = [ones["float32"]]

    if step:
        go.clear()
    pending = save(
        Checkpoint(step=step, model={**ones, **views}, optimizer={"moments": moments, "count": scalar},
                   rng={"state": generator}, history={"loss": history})
    )
    history[:] = generator[:] = 7
    change(ones, moments, references)
    del views, scalar
    go.set()
    if step:
        pending.wait_copied()
        pending.wait()

    loaded = manager.load(step, framework=framework)
    plain = manager.load(step)
    for section in (loaded.model, plain.model):
        assert len(section) == len(DTYPES) + 2
        for label, a in section.items():
            assert (a == 1).all(), (step, label)
    assert plain.model["transposed"].shape == (512, 512) and plain.model["part"].shape == (SIZE - 8,)
    assert all((m == 1).all() for m in plain.optimizer["moments"]) and plain.optimizer["count"] == 1
    assert (plain.history["loss"] == 1).all() and (plain.rng["state"] == 1).all()
    assert type(plain.optimizer["moments"]) is list and plain.optimizer["moments"][1].shape == (2, 4)
manager.close()
"""
IN_PLACE = """
def change(ones, moments, references):
    for dtype, a in ones.items():
        a += 1
        a[0] = 5
        a[:8] *= 3
        mx.eval(a)
    moments[0] -= 1
    moments[1][0] = 9
    mx.eval(moments)
    ones.clear(); moments.clear(); references.clear()
    mx.clear_cache()
    mx.eval([mx.full(SIZE, 3, dtype=mx.float32) for _ in range(8)])  # where freed memory was
"""
DONATED = """
double = jax.jit(lambda tree: jax.tree.map(lambda a: a + a, tree), donate_argnums=0)

def change(ones, moments, references):
    expected = {dtype: np.asarray(a) + np.asarray(a) for dtype, a in ones.items()}
    doubled = jax.block_until_ready(double(dict(ones)))
    assert all((np.asarray(doubled[dtype]) == expected[dtype]).all() for dtype in ones)
    for a in moments:
        a.delete()
    ones.clear(); moments.clear(); references.clear()
    jax.block_until_ready([xp.full(SIZE, 3, dtype=xp.float32) for _ in range(8)])  # where freed memory was
    double(doubled)
"""


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_changes_after_the_call_do_not_change_the_file(check, framework):
    check(framework, DELAYED_THREADS + {"jax": DONATED, "mlx": IN_PLACE}[framework] + INDEPENDENT)


NO_COPY = r"""
import os, re, resource

def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not ru_maxrss: it starts with the value of the parent process.
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])

large = xp.ones(32 << 20, dtype=xp.float32)  # 128 MiB
manager.save_async(Checkpoint(step=0, model={"w": large[:1]}, history={"loss": np.ones(9)})).wait()
getattr(large, "block_until_ready", lambda: xp.eval(large))()
initial = peak()
manager.save_async(Checkpoint(step=1, model={"w": large}, history={"loss": np.ones(9)})).wait()
print(peak() - initial)
copied = np.array(large)
print(peak() - initial)
"""


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_background_save_makes_no_copy(check, framework):
    saving, copying = map(int, check(framework, NO_COPY).split())
    assert saving < 64 << 20
    assert copying > 96 << 20  # checks the measurement: a copy is visible


RELEASED = """
import os, subprocess

manager.save(Checkpoint(step=1, model={"w": np.ones(4 << 20, np.float64)}))

def resident():
    return 1024 * int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())]))

def load(**options):
    loaded = manager.load(1, framework=framework, **options)
    assert loaded.model["w"][-1].item() == 1
    return loaded

loaded = load()
initial = resident()
for _ in range(5):
    del loaded
    loaded = load()
print(resident() - initial)
alive = [load() for _ in range(3)]
print(resident() - initial)
"""


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_memory_is_released_on_reload(check, framework):
    reloaded, referenced = map(int, check(framework, RELEASED).split())
    assert reloaded < 96 << 20  # mlx and jax may cache some freed memory
    assert referenced > 64 << 20


#: Each case is a state, and words of its error message.
REJECTED_BY_JAX = """
deleted, donated = xp.ones(3), xp.ones(3)
deleted.delete()
jax.jit(lambda a: a + 1, donate_argnums=0)(donated)
key = jax.random.key(0)

@jax.jit
def inside(a):
    expect({"w": a}, "traced", "outside of jit")
    return a

inside(xp.ones(3))
jax.vmap(lambda a: (expect({"w": a}, "traced"), a)[1])(xp.ones(3))
jax.grad(lambda a: (expect({"w": a}, "traced"), a)[1])(1.0)
jax.jit(lambda a: (expect({"w": a}, "traced"), a)[1])(key)
expect({"w": key}, "PRNG key", "jax.random.key_data(key)")
expect({"w": deleted}, "deleted")
expect({"w": donated}, "donated")
expect({"w": array(np.ones(3, ml_dtypes.int4))}, "int4")
expect({"w": xp.ones(3, dtype=xp.complex128)}, "complex128")
expect({"w": xp.ones(3, dtype=xp.float8_e4m3b11fnuz)}, "float8_e4m3b11fnuz")
Array = type(donated)
original = Array.is_fully_addressable
Array.is_fully_addressable = property(lambda array: False)  # as if another process held a part
expect({"w": xp.ones(3)}, "other processes", "process_allgather")
Array.is_fully_addressable = original

manager.save(Checkpoint(step=1, rng={"key": jax.random.key_data(key)}))
restored = jax.random.wrap_key_data(manager.load(1, framework="jax").rng["key"])
assert restored.dtype == key.dtype and (jax.random.bits(restored, 9) == jax.random.bits(key, 9)).all()
"""
REJECTED_BY_MLX = """
mx.compile(lambda a: (expect({"w": a}, "mx.eval", "compiled"), a)[1])(mx.ones(3))
"""
LAZY_ON_ANOTHER_THREAD = """
lazy = {"w": mx.ones(3) + 1}

def run():
    try:
        manager.save(Checkpoint(step=1, model=lazy))
    except UnsupportedState as error:
        assert "Call mx.eval" in str(error) and "thread" in str(error), error
        mx.eval(mx.ones(3))  # mlx itself still works
    else:
        assert (manager.load(1).model["w"] == 2).all()
    print("done")

thread = threading.Thread(target=run)
thread.start()
thread.join()
manager.save(Checkpoint(step=1, model=lazy))
assert (manager.load(1).model["w"] == 2).all()
"""


@pytest.mark.parametrize("framework", mlx_only)
def test_lazy_array_of_another_thread_is_rejected_there_and_saved_here(check, framework):
    """Older versions of mlx can evaluate it on any thread."""
    assert check(framework, LAZY_ON_ANOTHER_THREAD) == "done\n"


LAZY_ON_THIS_THREAD = """
def train():
    with mx.stream(mx.new_stream(mx.cpu)):  # evaluated on that stream
        other_stream = mx.ones((1000,), dtype=mx.bfloat16) * 3
    lazy = {
        "sum": mx.arange(1000) + 1, "other_stream": other_stream, "both": other_stream.astype(mx.float32) - 1,
    }
    go.clear()
    pending = manager.save_async(Checkpoint(step=1, model=dict(lazy)))
    for name in lazy:
        lazy[name] += 1  # lazy again
    lazy["other_stream"][3:] = 0
    mx.eval(lazy)
    lazy.clear()
    mx.clear_cache()
    go.set()
    pending.wait()
    saved = manager.load(1, framework=framework).model
    assert (saved["sum"] == mx.arange(1, 1001)).all()
    assert saved["other_stream"].dtype == mx.bfloat16 and (saved["other_stream"] == 3).all()
    assert (saved["both"] == 2).all()
    print("done")

trainer = threading.Thread(target=train)
trainer.start()
trainer.join()
"""


@pytest.mark.parametrize("framework", mlx_only)
def test_lazy_array_is_saved_as_it_was_at_the_call(check, framework):
    """It is evaluated and aliased on the caller's thread, on any stream, before the write begins."""
    assert check(framework, DELAYED_THREADS + LAZY_ON_THIS_THREAD) == "done\n"


MAPPED = """
manager.save(Checkpoint(step=1, model={"w": mx.arange(4096)}))
arrays = [
    manager.load(1, framework=framework, mmap=True, **options).model["w"]
    for options in ({}, {"verify": "lazy"})
]
views = manager.load(1, mmap=True, verify="lazy").model
with open(manager.inspect(1).path, "r+b") as file:
    file.seek(-4096, 2)
    file.write(bytes(4096))
assert all((array == mx.arange(4096)).all() for array in arrays)
try:
    views["w"]
except CorruptCheckpoint:
    print("numpy arrays are views of the file")
"""


@pytest.mark.parametrize("framework", mlx_only)
def test_mapped_file_is_copied_for_mlx(check, framework):
    """mlx arrays cannot be views, so they do not change with the file."""
    output = check(framework, "from distrust.errors import CorruptCheckpoint\n" + MAPPED)
    assert output == "numpy arrays are views of the file\n"


EXPECT = """
import os
errors = []

def expect(model, *words):
    try:
        manager.save(Checkpoint(step=1, model=model))
    except UnsupportedState as error:
        assert all(word in str(error) for word in words), error
        assert len(str(error).splitlines()) == 1
        assert error.label in ("model.w", "mlx arrays")
        errors.append(error)
    else:
        raise AssertionError(f"saved: {words}")
    assert os.listdir(directory) == [".lock"]
"""


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_array_that_cannot_be_restored_exactly_is_rejected_and_nothing_is_written(check, framework):
    code, cases = {"jax": (REJECTED_BY_JAX, 11), "mlx": (REJECTED_BY_MLX, 1)}[framework]
    assert check(framework, EXPECT + code + "print(len(errors))") == f"{cases}\n"


LOAD_UNSUPPORTED = """
for step, dtype in enumerate(lacking):
    host = random_array(dtype)
    manager.save(Checkpoint(step=step, model={"w": host}))
    for options in ({}, {"mmap": True}):
        try:
            manager.load(step, framework=framework, **options)
        except ConfigError as error:
            assert dtype in str(error), error
            print(error)
    assert manager.load(step).model["w"].tobytes() == host.tobytes()
"""


@pytest.mark.parametrize("framework", jax_only)
def test_error_for_jax_without_64_bits_names_the_remedy(check, framework):
    narrow = 'jax.config.update("jax_enable_x64", False)\nlacking = ["float64", "int64", "uint64"]'
    lines = check(framework, narrow + LOAD_UNSUPPORTED).splitlines()
    assert len(lines) == 6
    assert all('jax.config.update("jax_enable_x64", True)' in line for line in lines)


@pytest.mark.parametrize("framework", mlx_only)
def test_error_names_the_dtype_that_mlx_lacks(check, framework):
    lines = check(framework, "lacking = sorted(LACKING)" + LOAD_UNSUPPORTED).splitlines()
    assert len(lines) == 10
    assert lines[0] == 'mlx has no float8_e4m3fn: load with framework="numpy" or "torch"'


THREADS = """
arrays = {"w": array(random_array("bfloat16")), "v": xp.ones(1 << 20)}
loaded = []

def run():
    manager.save_async(Checkpoint(step=1, model=arrays)).wait()
    loaded.append(manager.load(1, framework=framework).model)

getattr(xp, "eval", lambda _: None)(arrays)
thread = threading.Thread(target=run)
thread.start()
thread.join()
assert bits(loaded[0]["w"]) == bits(arrays["w"])
assert (loaded[0]["v"] + 1 == 2).all()
"""


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_arrays_are_saved_and_loaded_on_other_threads(check, framework):
    check(framework, THREADS)
