"""The examples run, each as a user runs it, and say what they promise."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distrust import DistrustTrainer

EXAMPLES = Path(__file__).parent.parent / "examples"

#: What each is to print, its steps being few.
SAID = {
    "asynchronous": r"cancelled: \S+/checkpoint-\d\S* is saved\n(.*\n)*finished at step 4: state ",
    "callbacks": r"step 4: loss [\d.]+, .*\n(.*\n)*over at step 4: finished\n",
    "own_examples": r"finished at step 4: state digest \w{64}\n",
    "plain_checkpoints": r"going on after step 2\nloss (\S+) in one go, \1 in two: equal\n",
    "train": r"stopped after step 2, saved as checkpoint-2\.safetensors\nfinished at step 4: ",
    "weights": r"notebook +weighs (\S+)\n(.*\n)*encyclopedia +weighs 0\.\d+\n",
}
TAKES_EXAMPLES = "examples" in inspect.signature(DistrustTrainer).parameters


@pytest.fixture(scope="module")
def outputs():
    """All of them at once: most of the time of each goes into loading its libraries."""
    wanted = [name for name in SAID if name != "own_examples" or TAKES_EXAMPLES]
    running = {
        name: subprocess.Popen(
            [sys.executable, "-W", "error::distrust.DistrustWarning", EXAMPLES / f"{name}.py", "4"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for name in wanted
    }
    try:
        return {name: (process.communicate(timeout=120)[0], process) for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()


@pytest.mark.parametrize("name", SAID)
def test_an_example_says_what_it_promises(outputs, name):
    if name == "own_examples" and not TAKES_EXAMPLES:
        pytest.skip("DistrustTrainer does not take examples yet")
    said, process = outputs[name]
    assert process.returncode == 0, said
    assert re.search(SAID[name], said), said


def test_every_example_is_run_and_says_how():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(SAID)
    for name in SAID:
        text = (EXAMPLES / f"{name}.py").read_text("utf-8")
        assert f"\npython examples/{name}.py" in text.split('"""')[1]
        assert len(text.splitlines()) <= 60, name
