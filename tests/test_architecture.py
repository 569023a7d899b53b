"""The walls of the house: who imports whom, and what is loaded by whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import distrust
from distrust import Checkpoint, CheckpointManager

ROOT = Path(distrust.__file__).parent
MODULES = {
    ".".join(("distrust", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

#: Whatever stands in a line may import what stands in the lines above it, and nothing of its own line.
STOREYS = [
    {"errors", "bundled"},
    {"checkpoint", "weighting"},
    {"provenance", "atomic"},
    {"config"},
    {"data"},
    {"contract"},
    {"training", "engines"},
    {"testing", "importers", "reporting"},
    {"demo", "evaluation", "export"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(STOREYS) for room in rooms}


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path: Path, *, at_import_only: bool = False) -> Iterator[str]:
    """The modules of this package that a file names in its imports."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides who imports whom"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)
        elif at_import_only and (
            is_for_types_only(node) or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ):
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return (name for name in walk(ast.parse(path.read_text("utf-8"))) if name.split(".")[0] == "distrust")


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_has_its_storey():
    assert {room(module) for module in MODULES} - {""} <= LEVEL.keys()


@pytest.mark.parametrize("module", [name for name in MODULES if name != "distrust"])
def test_imports_run_one_way(module):
    for imported in imports(MODULES[module]):
        if imported == "distrust":
            continue  # the version; public names are loaded lazily, and nobody inside asks for them
        if room(imported) == room(module):
            continue
        assert LEVEL[room(imported)] < LEVEL[room(module)], f"{module} imports {imported}"


def test_the_checkpoint_core_imports_only_the_errors():
    found = {
        room(imported)
        for name in MODULES
        if room(name) == "checkpoint"
        for imported in imports(MODULES[name])
    }
    assert found == {"checkpoint", "errors"}


def test_engines_know_neither_each_other_nor_the_trainer():
    for module in (name for name in MODULES if name.startswith("distrust.engines.")):
        others = {"torch", "mlx"} - {module.split(".")[2]}
        for imported in imports(MODULES[module]):
            assert not imported.startswith("distrust.training.trainer"), f"{module} imports the trainer"
            assert imported != "distrust.training", f"{module} imports the trainer's package"
            if imported.startswith("distrust.engines."):
                assert imported.split(".")[2] not in others, f"{module} imports {imported}"


def test_only_engines_and_the_core_name_a_framework():
    """The loop knows none; the core has its adapters in one folder."""
    for module, path in MODULES.items():
        if room(module) == "engines" or module.startswith("distrust.checkpoint.arrays"):
            continue
        named = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert not named & {"torch", "mlx", "mlx_lm", "jax", "peft", "tensorflow"}, module


def test_no_module_imports_itself_in_a_circle():
    graph = {name: set(imports(path, at_import_only=True)) & MODULES.keys() for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for imported in sorted(graph[module]):
                visit(imported, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_public_names():
    assert distrust.__all__ == [
        "Checkpoint",
        "CheckpointManager",
        "DistrustError",
        "DistrustTrainer",
        "DistrustWarning",
        "PendingSave",
        "RunEnded",
        "RunState",
        "TrainConfig",
    ]
    assert distrust.__all__ == sorted(distrust.__all__)
    for name in distrust.__all__:
        assert getattr(distrust, name).__name__ == name
    with pytest.raises(AttributeError, match="Nothing"):
        _ = distrust.Nothing


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "py.typed").is_file()


HEAVY = {
    "asyncio",
    "datasets",
    "jax",
    "ml_dtypes",
    "mlx",
    "numpy",
    "peft",
    "pyarrow",
    "safetensors",
    "torch",
    "transformers",
    "tyro",
}
SHOW = "\nimport sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"


@pytest.mark.parametrize(
    "code",
    [
        "import distrust",
        "from distrust import DistrustError, DistrustWarning",
        "import distrust.checkpoint.format, distrust.checkpoint.catalog, distrust.checkpoint.tree",
        "from distrust import CheckpointManager; CheckpointManager('nowhere').list_checkpoints()",
        "import distrust.cli",
    ],
)
def test_what_needs_nothing_heavy_loads_nothing_heavy(run_python, code):
    done = run_python(code + SHOW)
    assert done.returncode == 0, done.stderr
    assert HEAVY & set(done.stdout.split()) == set()


def test_saving_and_loading_arrays_of_numpy_loads_no_other_framework(run_python, tmp_path):
    code = """
import numpy as np, sys
from distrust import Checkpoint, CheckpointManager
with CheckpointManager(sys.argv[1]) as manager:
    manager.save_async(Checkpoint(step=1, model={"w": np.ones(3)})).wait()
    manager.load(1)
"""
    done = run_python(code + SHOW, tmp_path)
    assert done.returncode == 0, done.stderr
    assert HEAVY & set(done.stdout.split()) == {"numpy"}


@pytest.mark.parametrize("command", ["ls", "show", "verify", "prune", "diff"])
def test_the_commands_on_files_stay_light(run_python, tmp_path, command):
    with CheckpointManager(tmp_path) as manager:
        path = manager.save(Checkpoint(step=1, metadata={"a": 1}))
    special = {"diff": [path, path], "prune": [tmp_path, "--damaged", "--keep-last", 1]}
    arguments = special.get(command, [path])

    done = run_python("from distrust.cli import main; assert main() == 0" + SHOW, command, *arguments)

    assert done.returncode == 0, done.stderr
    assert HEAVY & set(done.stdout.splitlines()[-1].split()) == set()
