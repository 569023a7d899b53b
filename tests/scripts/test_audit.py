"""The audit of the pinned versions reports findings, and never fails where there is no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "audit.py"
FINDING = {"id": "PYSEC-2026-1", "aliases": [], "fix_versions": ["2.0"], "description": ""}
SKIPPED = {"name": "torch", "skip_reason": "not found"}


def audit(tmp_path: Path, pip_audit: str) -> subprocess.CompletedProcess[str]:
    """Runs the script with a module in the place of pip-audit."""
    (tmp_path / "pip_audit.py").write_text(pip_audit)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    return subprocess.run(
        [sys.executable, SCRIPT], capture_output=True, text=True, check=False, env=environment
    )


def report(*packages: dict[str, object]) -> str:
    return f"print({json.dumps({'dependencies': packages, 'fixes': []})!r})"


def test_a_finding_is_an_error(tmp_path):
    package = {"name": "jinja2", "version": "1.0", "vulns": [FINDING]}
    completed = audit(tmp_path, report(package, {"name": "rich", "version": "1", "vulns": []}, SKIPPED))
    assert completed.returncode == 1
    assert completed.stdout.splitlines() == [
        "jinja2 1.0: PYSEC-2026-1, fixed in 2.0",
        "audited 2 pinned versions; known vulnerabilities: 1",
    ]


@pytest.mark.parametrize("pip_audit", [report(SKIPPED), "raise OSError('no network')", "raise ImportError"])
def test_without_the_database_it_is_one_dated_line(tmp_path, pip_audit):
    completed = audit(tmp_path, pip_audit)
    assert completed.returncode == 0
    assert completed.stdout.startswith("not audited: ")
    assert completed.stdout.count("\n") == 1
