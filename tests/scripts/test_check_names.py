"""The lint of names finds what it forbids, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "check_names.py"


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, path], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "def load():\n    found = 1",
        "def load():\n    for place in []: pass",
        "def load():\n    with open('x') as there: pass",
        "def load():\n    if (told := 1): pass",
        "def load():\n    return [kept for kept in []]",
        "def load():\n    a, (b, rest) = 1, (2, 3)",
        "async def load():\n    def inner():\n        whole = 1",
        "def opened(): pass",
        "class A:\n    def _written(self): pass",
        "async def within(): pass",
    ],
)
def test_a_vague_name_is_rejected(tmp_path, code):
    path = tmp_path / "module.py"
    path.write_text(code)
    result = lint(path)
    assert result.returncode == 1
    assert result.stdout.startswith(f"{path}:")
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    "code",
    [
        "found = 1",  # a module's constant
        "def load(found): pass",  # a parameter
        "def load():\n    return found",  # it is only read
        "def load_found(): pass",
        "class A:\n    @property\n    def done(self): pass",
        "def seed():\n    left, right = 1, 2",
    ],
)
def test_other_names_are_not(tmp_path, code):
    path = tmp_path / "module.py"
    path.write_text(code)
    result = lint(path)
    assert (result.returncode, result.stdout) == (0, "")
