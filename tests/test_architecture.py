"""Import boundaries: which module may import which, and what is loaded by whom.

The checks take the folder of a package, so that the tests can run them on a copy with a planted violation.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import distrust
import distrust.checkpoint
import distrust.errors
from distrust import Checkpoint, CheckpointManager

ROOT = Path(distrust.__file__).parent

#: A part of the package may import the parts in the lines above its own, and no other part in its own line.
LAYERS = [
    {"errors", "bundled"},
    {"activity"},
    {"checkpoint", "weighting"},
    {"paths", "ranks"},
    {"provenance", "atomic"},
    {"options"},
    {"option_values"},
    {"config"},
    {"config_text"},
    {"run_record"},
    {"remote_copies"},
    {"data"},
    {"contract"},
    {"training", "engines"},
    {"importers", "integrations", "reporting"},
    {"export"},
    {"trainer", "previews"},
    {"demo", "testing"},
    {"cli"},
    {"__main__"},
]
LEVEL = {top: level for level, layer in enumerate(LAYERS) for top in layer}

#: Modules that import modules of the project by a name in a string, and why that is no hidden dependency.
STRING_IMPORTS = {
    "distrust": "public names are loaded on first access",
    "distrust.checkpoint": "public names are loaded on first access",
    "distrust.checkpoint.arrays": "an adapter in the same package is loaded with its framework",
    "distrust.cli": "a command loads only its own module",
    "distrust.integrations.transformers": "public names are loaded on first access",
}
IMPORT_FUNCTIONS = {"import_module", "__import__", "run_module"}
FRAMEWORKS = {"torch", "mlx", "mlx_lm", "jax", "peft", "tensorflow"}
#: They import a framework.
TRAINERS = {"accelerate", "lightning", "pytorch_lightning", "transformers", "trl"}


def modules_of(root: Path) -> dict[str, Path]:
    return {
        ".".join(("distrust", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in sorted(root.rglob("*.py"))
    }


MODULES = modules_of(ROOT)


def top_of(module: str) -> str:
    """The part below ``distrust``: of ``distrust.data.cache`` it is ``data``."""
    return module.split(".")[1] if "." in module else ""


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path: Path, modules: dict[str, Path], *, at_import_only: bool = False) -> Iterator[str]:
    """The modules that the import statements of a file name, this package's and others'."""
    for module, inner in _imports(path.read_text("utf-8"), at_import_only):
        yield inner if inner in modules else module


@cache  # by its text: a file may be changed
def _imports(text: str, at_import_only: bool) -> tuple[tuple[str, str], ...]:
    """The modules that statements name, and the names in them that may be modules, too."""

    def walk(node: ast.AST) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield f"{'.' * node.level}{node.module or ''}", ""  # check_imports rejects it
                return
            yield from ((str(node.module), f"{node.module}.{alias.name}") for alias in node.names)
        elif at_import_only and (
            is_for_types_only(node) or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ):
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return tuple(walk(ast.parse(text)))


def string_imports(path: Path) -> tuple[str, ...]:
    """The calls that import a module of this package by a string, or by one that is made at run time."""
    return _string_imports(path.read_text("utf-8"))


@cache
def _string_imports(text: str) -> tuple[str, ...]:
    calls = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in IMPORT_FUNCTIONS:
            name = node.args[0] if node.args else None
            if not isinstance(name, ast.Constant) or str(name.value).split(".")[0] == "distrust":
                calls.append(ast.unparse(node))
    return tuple(calls)


def check_imports(root: Path) -> list[str]:
    """Every violation of the layers by an import statement or an import by string."""
    modules, violations = modules_of(root), []
    for module, path in modules.items():
        for imported in imports(path, modules):
            package = imported.split(".")[0]
            if not package:
                violations.append(f"{module} has the relative import {imported}")
            elif (package in FRAMEWORKS and not may_name_a_framework(module)) or (
                package == "distrust" and not may_import(module, imported)
            ):
                violations.append(f"{module} imports {imported}")
        if module not in STRING_IMPORTS:
            violations += [f"{module} imports by string: {call}" for call in string_imports(path)]
    return violations


def may_import(module: str, imported: str) -> bool:
    if imported == "distrust":
        return True  # for the version: public names are lazy, and no module inside asks for them
    if module == "distrust":
        return True  # the package composes: its names are lazy
    if top_of(module) == top_of(imported):
        engines = [name.split(".")[2] for name in (module, imported) if name.count(".") >= 2]
        return top_of(module) != "engines" or set(engines) != {"torch", "mlx"}
    return LEVEL[top_of(imported)] < LEVEL[top_of(module)]


def may_name_a_framework(module: str) -> bool:
    """The loop knows none; the core has an adapter for each in one folder."""
    adapters = ("distrust.engines.", "distrust.importers.", "distrust.checkpoint.arrays.")
    return module.startswith((*adapters, "distrust.integrations.")) or module == "distrust.testing.models"


def loaded_by(root: Path, names: list[str]) -> set[str]:
    """The modules of this package that are loaded once these have been imported, in a new process."""
    code = (
        "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(root.parent)}
    result = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    return {name for name in result.stdout.split() if name.split(".")[0] == "distrust"}


def check_loaded(root: Path, top: str) -> list[str]:
    """What importing a part of the package loads although its layer may not import it."""
    modules = modules_of(root)
    names = [name for name in modules if top_of(name) == top and not imports_a_framework(name, modules)]
    allowed = {"", top} | {name for name, level in LEVEL.items() if level < LEVEL[top]}
    # The package itself loads the hook of foreign formats; see test_the_package_loads_only_its_hook.
    loaded = loaded_by(root, names) - loaded_by(root, ["distrust"])
    return [f"{top} loads {name}" for name in sorted(loaded) if top_of(name) not in allowed]


def imports_a_framework(module: str, modules: dict[str, Path]) -> bool:
    """Whether importing it loads a framework, directly or by a module of this package."""
    pending, visited = [module], set()
    while pending:
        name = pending.pop()
        visited.add(name)
        for imported in imports(modules[name], modules, at_import_only=True):
            if imported.split(".")[0] in FRAMEWORKS | TRAINERS:
                return True
            if imported in modules and imported not in visited:
                pending.append(imported)
    return False


def test_every_module_has_its_layer():
    assert {top_of(module) for module in MODULES} - {""} == LEVEL.keys()


def test_imports_run_one_way():
    assert check_imports(ROOT) == []


@pytest.mark.parametrize("top", sorted(LEVEL.keys() - {"__main__"}))
def test_nothing_above_its_layer_is_loaded(top):
    assert check_loaded(ROOT, top) == []


def test_the_package_loads_only_its_hook_of_foreign_formats():
    assert loaded_by(ROOT, ["distrust"]) == {
        "distrust",
        "distrust.checkpoint",
        "distrust.checkpoint.foreign",
        "distrust.errors",
    }


def test_string_imports_have_a_reason_as_long_as_they_exist():
    assert {module for module, path in MODULES.items() if string_imports(path)} == STRING_IMPORTS.keys()


PLANTED = {
    "an import statement": ("checkpoint/format.py", "from distrust.config import TrainConfig\n"),
    "an import in a function": ("data/cache.py", "def late():\n    import distrust.training.run\n"),
    "a relative import": ("data/cache.py", "from . import corpus\n"),
    "an import by string": ("training/run.py", "import_module('distrust.engines')\n"),
    "a name made at run time": ("checkpoint/lock.py", "import_module('dis' + 'trust.cli')\n"),
    "Python's own function": ("checkpoint/lock.py", "__import__('distrust.cli')\n"),
    "the other engine": ("engines/torch/engine.py", "from distrust.engines.mlx import model\n"),
    "the loop in an engine": ("engines/torch/engine.py", "from distrust.training import run\n"),
    "a framework in the loop": ("training/run.py", "def late():\n    import torch\n"),
}


@pytest.fixture(scope="module")
def copy_of_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "distrust"))


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_violation_is_rejected(copy_of_package, kind):
    name, code = PLANTED[kind]
    path = copy_of_package / name
    text = path.read_text("utf-8")
    path.write_text(text + code, "utf-8")
    try:
        (violation,) = check_imports(copy_of_package)
    finally:
        path.write_text(text, "utf-8")
    assert violation.startswith(f"distrust.{name.removesuffix('.py').replace('/', '.')} ")


def test_a_planted_violation_that_no_statement_shows_is_rejected(copy_of_package):
    """Code that hides the import from any reader is seen by what is loaded."""
    path = copy_of_package / "checkpoint" / "retention.py"
    text = path.read_text("utf-8")
    path.write_text(text + "\nexec('import distrust.config')\n", "utf-8")
    try:
        assert check_imports(copy_of_package) == []
        assert "checkpoint loads distrust.config" in check_loaded(copy_of_package, "checkpoint")
    finally:
        path.write_text(text, "utf-8")


def test_no_module_imports_itself_in_a_circle():
    graph = {
        name: set(imports(path, MODULES, at_import_only=True)) & MODULES.keys()
        for name, path in MODULES.items()
    }
    visited: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in visited:
            for imported in sorted(graph[module]):
                visit(imported, (*above, module))
            visited.add(module)

    for module in graph:
        visit(module, ())


def test_the_public_names():
    names = {"Checkpoint", "CheckpointManager", "DistrustTrainer", "PendingSave", "RunEnded", "RunState"}
    names |= {"load_file", "save_file", "save_file_async", "verify_file"}
    classes = [value for value in vars(distrust.errors).values() if isinstance(value, type)]
    errors = {error.__name__ for error in classes if issubclass(error, Exception)}
    assert distrust.__all__ == sorted(names | {"TrainConfig", "preview"} | errors)
    for name in distrust.__all__:
        assert getattr(distrust, name).__name__ == name
    assert dir(distrust) == sorted([*distrust.__all__, "__version__"]), "no Python internals"
    assert dir(distrust.checkpoint) == sorted(distrust.checkpoint.__all__)
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
    result = run_python(code + SHOW)
    assert result.returncode == 0, result.stderr
    assert HEAVY & set(result.stdout.split()) == set()


def test_saving_and_loading_arrays_of_numpy_loads_no_other_framework(run_python, tmp_path):
    code = """
import numpy as np, sys
from distrust import Checkpoint, CheckpointManager
with CheckpointManager(sys.argv[1]) as manager:
    manager.save_async(Checkpoint(step=1, model={"w": np.ones(3)})).wait()
    manager.load(1)
"""
    result = run_python(code + SHOW, tmp_path)
    assert result.returncode == 0, result.stderr
    assert HEAVY & set(result.stdout.split()) == {"numpy"}


@pytest.mark.parametrize("command", ["ls", "show", "verify", "prune", "diff"])
def test_the_commands_on_files_stay_light(run_python, tmp_path, command):
    with CheckpointManager(tmp_path) as manager:
        path = manager.save(Checkpoint(step=1, metadata={"a": 1}))
    special = {"diff": [path, path], "prune": [tmp_path, "--damaged", "--keep-last", 1]}
    arguments = special.get(command, [path])

    result = run_python("from distrust.cli import main; assert main() == 0" + SHOW, command, *arguments)

    assert result.returncode == 0, result.stderr
    assert HEAVY & set(result.stdout.splitlines()[-1].split()) == set()
