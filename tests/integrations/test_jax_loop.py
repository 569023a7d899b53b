"""The example of a loop in jax is killed, run again, and ends as an undisturbed one."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

for library in ("flax", "jax", "optax"):
    pytest.importorskip(library)

EXAMPLE = Path(__file__).parents[2] / "examples" / "jax_flax_loop.py"

#: Runs the example in each folder; dies at the save of a step.
CODE = """
import os, runpy, signal, sys
from distrust import CheckpointManager
_, kill_at, path, *folders = sys.argv
save_async = CheckpointManager.save_async
def save_or_die(manager, checkpoint, **options):
    if checkpoint.step == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    return save_async(manager, checkpoint, **options)
CheckpointManager.save_async = save_or_die
for folder in folders:
    sys.argv = [path, folder]
    runpy.run_path(path, run_name="__main__")
"""


def test_a_killed_loop_ends_as_an_undisturbed_one(run_python, forked_jax, tmp_path):
    killed = run_python(CODE, 35, EXAMPLE, tmp_path / "killed", python=forked_jax)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folders = (tmp_path / "killed", tmp_path / "undisturbed")
    result = run_python(CODE, 0, EXAMPLE, *folders, python=forked_jax)
    end = r"finished at step 60: weights (\w{64})\n"
    # In the middle of the second epoch; the write of step 28 may have been in progress.
    ends = re.fullmatch(rf"resuming after step (?:21|28)\n{end}a new run\n{end}", result.stdout)
    assert ends, result.stdout + result.stderr
    assert ends[1] == ends[2]
