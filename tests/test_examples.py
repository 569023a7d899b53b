"""The examples run, as programs, and say what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

#: What each is to print, its steps being few.
SAID = {
    "asynchronous": r"cancelled: \S+/checkpoint-\d\S* is saved\n(.*\n)*finished at step 4: state ",
    "callbacks": r"step 4: loss [\d.]+, .*\n(.*\n)*over at step 4: finished\n",
    "own_examples": r"finished at step 4: state digest \w{64}\n",
    "plain_checkpoints": r"resuming after step 2\nloss (\S+) in one go, \1 in two: equal\n",
    "train": r"stopped after step 2, saved as checkpoint-2\.safetensors\n(.*\n)*finished at step 4: ",
    "weights": r"notebook +weighs (\S+)\n(.*\n)*encyclopedia +weighs 0\.\d+\n",
}
#: Those of a group run in one process: most of the time of each would go into loading its libraries.
GROUPS = [["train", "callbacks", "asynchronous", "own_examples"], ["plain_checkpoints"], ["weights"]]
RUN = """
import runpy, sys
for path in sys.argv[1:]:
    print(f"== {path}", flush=True)
    sys.argv = [path, "4"]
    runpy.run_path(path, run_name="__main__")
"""


@pytest.fixture(scope="module")
def said():
    """What each prints."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, *(EXAMPLES / f"{name}.py" for name in group)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for group in GROUPS
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * len(GROUPS), "\n".join(outputs)
    parts = [part.partition("\n") for output in outputs for part in output.split("== ")[1:]]
    return {Path(path).stem: text for path, _, text in parts}


@pytest.mark.parametrize("name", SAID)
def test_an_example_says_what_it_promises(said, name):
    assert re.search(SAID[name], said[name]), said[name]


def test_every_example_is_run_and_says_how():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(SAID)
    for name in SAID:
        text = (EXAMPLES / f"{name}.py").read_text("utf-8")
        assert f"\npython examples/{name}.py" in text.split('"""')[1]
        assert len(text.splitlines()) <= 60, name
