"""Every code block of the README is pasted into a shell or into Python, in order, in one empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
#: The set-up commands: they would run this suite. CI runs them.
MAKE = [code for language, code in BLOCKS if language == "sh" and code.startswith("make ")]
MOST_WORDS = 1_300


@pytest.fixture
def command(forked_python, tmp_path):
    """A folder with the command ``distrust``, which starts at once."""
    (tmp_path / "bin").mkdir()
    path = tmp_path / "bin" / "distrust"
    path.write_text(f'#!/bin/sh\nexec {forked_python} -m distrust "$@"\n', "utf-8")
    path.chmod(0o755)
    return path.parent


def test_every_block_runs(tmp_path, forked_python, command):
    environment = {
        **os.environ,
        "PATH": f"{command}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DISTRUST_CACHE": str(tmp_path / "cache"),
    }
    for language, code in BLOCKS:
        if code in MAKE:
            continue
        assert language in {"sh", "python"}, language
        line = ["bash", "-euo", "pipefail", "-c", code] if language == "sh" else [forked_python, "-c", code]
        result = subprocess.run(
            line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert result.returncode == 0, f"{code}\n{result.stdout}\n{result.stderr}"
    assert "equal" in subprocess.check_output(
        ["distrust", "diff", "runs/killed", "runs/undisturbed"], cwd=tmp_path, env=environment, text=True
    )
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()


def test_the_installed_command_exists():
    command = Path(sys.executable).parent / "distrust"
    assert subprocess.check_output([command, "--version"], text=True).startswith("distrust ")


@pytest.mark.parametrize("line", [line for code in MAKE for line in code.splitlines()])
def test_the_make_targets_exist(line):
    target = line.split("#")[0].split()[1]
    assert (
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=False).returncode
        == 0
    )


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_it_is_short():
    assert len(README.split()) <= MOST_WORDS
