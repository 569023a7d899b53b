"""Which engine is used, what is loaded for it, and what a missing library says."""

from __future__ import annotations

import pytest

from distrust.engines import registry
from distrust.errors import MissingDependency

LOADED = """
import sys, distrust.engines
modules = {".".join(name.split(".")[:2]) for name in sys.modules}
print(*sorted(modules & {"distrust.training", "distrust.trainer", "torch", "mlx", "transformers", "peft"}))
"""


def test_importing_engines_loads_neither_the_trainer_nor_a_framework(run_python):
    process = run_python(LOADED)
    assert (process.returncode, process.stdout.strip()) == (0, ""), process.stderr


@pytest.mark.parametrize(
    ("name", "library", "extra"), [("torch", "torch", "train"), ("mlx", "mlx_lm", "mlx")]
)
def test_without_any_framework_the_error_names_the_preferred_one(monkeypatch, name, library, extra):
    monkeypatch.setattr(registry, "find_spec", lambda _: None)
    with pytest.raises(
        MissingDependency, match=f"^reading it needs {library}, which is not installed"
    ) as error:
        registry.first_installed(name, purpose="reading it")
    assert (error.value.library, error.value.extra) == (library, extra)
    assert f"[{extra}]'" in str(error.value)


@pytest.mark.parametrize(("name", "other"), [("torch", "mlx"), ("mlx", "torch")])
def test_an_installed_engine_replaces_a_missing_one(monkeypatch, name, other):
    installed = registry.ENGINES[other][0]
    monkeypatch.setattr(registry, "find_spec", lambda library: library if library == installed else None)
    assert registry.first_installed(name, purpose="reading it") == other
