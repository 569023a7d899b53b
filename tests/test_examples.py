"""The examples run, as programs, and say what they promise."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

#: What each is to print, its steps being few.
SAID = {
    "accelerate_loop": r"^finished at step 48, sum of weights -?[\d.]+\n",
    "asynchronous": r"cancelled: \S+/checkpoint-\d\S* is saved\n(.*\n)*finished at step 4: state ",
    "callbacks": r"step 4: loss [\d.]+, .*\n(.*\n)*over at step 4: finished\n",
    "jax_flax_loop": r"a new run\nfinished at step 60: weights \w{64}\n",
    "lightning_module": r"finished at step 40: weights \w{64}\n",
    "mlx_lm_lora": r"\nfinished at step 12, sum of weights -?[\d.]+\n",
    "own_examples": r"finished at step 4: state digest \w{64}\n",
    "plain_checkpoints": r"resuming after step 2\nloss (\S+) in one go, \1 in two: equal\n",
    "transformers_trainer": r"finished at step 9, mean loss [\d.]+\n",
    "trl_sft": r"finished at step 20, mean loss [\d.]+\n",
    "train": r"stopped after step 2, saved as checkpoint-2\.safetensors\n(.*\n)*finished at step 4: ",
    "weights": r"notebook +weighs (\S+)\n(.*\n)*encyclopedia +weighs 0\.\d+\n",
}
#: Those of a group run in one process: most of the time of each would go into loading its libraries.
GROUPS = [
    ["train", "callbacks", "asynchronous", "own_examples", "plain_checkpoints"],
    ["jax_flax_loop"],
    ["weights"],
    ["mlx_lm_lora"],
    ["accelerate_loop", "lightning_module"],
    ["transformers_trainer", "trl_sft"],
]
#: Those that get a folder to work in, instead of a number of steps.
IN_A_FOLDER = {
    "accelerate_loop",
    "jax_flax_loop",
    "lightning_module",
    "mlx_lm_lora",
    "transformers_trainer",
    "trl_sft",
}
RUN = """
import os, runpy, sys
if jax := sys.modules.get("jax"):  # it compiles in each process, unless that is cached
    jax.config.update("jax_compilation_cache_dir", os.environ["COMPILED"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
for path, argument in zip(sys.argv[1::2], sys.argv[2::2]):
    print(f"== {path}", flush=True)
    sys.argv = [path, argument]
    runpy.run_path(path, run_name="__main__")
"""

#: Says which checkpoints get their names, and dies just before one does; 0: never.
WATCHED = """
import os, signal, sys
names = []
def watch(event, arguments):
    if event == "os.rename" and os.fspath(arguments[1]).endswith(".safetensors"):
        names.append(arguments[1])
        print("named", arguments[1], flush=True)
        if len(names) == DIES_AT:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
"""


@pytest.fixture(scope="module")
def python_of(forked_python, forked_jax):
    """The Python with the imports of an example done."""
    return lambda name: forked_jax if name == "jax_flax_loop" else forked_python


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    # mlx compiles on the first use of a machine, for half a minute.
    no_compilation = {"OMP_NUM_THREADS": "1", "MLX_DISABLE_COMPILE": "1"}
    return {**no_compilation, "COMPILED": str(tmp_path_factory.mktemp("compiled"))}


@pytest.fixture(scope="module")
def said(python_of, environment, tmp_path_factory):
    """What each prints."""
    folder = tmp_path_factory.mktemp("examples")

    def command(group):
        for name in group:
            yield from (EXAMPLES / f"{name}.py", folder / name if name in IN_A_FOLDER else "4")

    running = [
        subprocess.Popen(
            [python_of(group[0]), "-c", RUN, *command(group)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
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


@pytest.mark.parametrize(
    ("name", "dies_at"),
    [
        ("accelerate_loop", 3),
        ("jax_flax_loop", 4),  # in the middle of the second epoch
        ("lightning_module", 3),
        ("mlx_lm_lora", 3),
    ],
)
def test_a_killed_example_ends_as_an_undisturbed_one(
    said, start_python, python_of, environment, tmp_path, name, dies_at
):
    """The tests of these libraries have the other instants."""
    outputs, steps = [], []
    for number, code in ((dies_at, -signal.SIGKILL), (0, 0)):
        program = f"DIES_AT = {number}\n{WATCHED}{RUN}"
        arguments = (EXAMPLES / f"{name}.py", tmp_path)
        process = start_python(program, *arguments, python=python_of(name), **environment)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        outputs.append(output)
        steps.append([int(step) for step in re.findall(r"named \S+/checkpoint-(\d+)", output)])
    assert steps[0][-1] == steps[1][0]  # it resumed from the one before
    ending = re.compile(r"^finished at step .*$", re.MULTILINE)
    assert ending.findall(outputs[1]) == ending.findall(said[name]) != []


def test_every_example_is_run_and_says_how():
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(SAID)
    for name in SAID:
        text = (EXAMPLES / f"{name}.py").read_text("utf-8")
        assert f"\npython examples/{name}.py" in text.split('"""')[1]
        assert len(text.splitlines()) <= 60, name
