"""``distrust train``: killed, stopped and refused as a user would meet it; and ``distrust generate``."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from importlib.util import find_spec

import pytest

from campaigns.training_run import TrainingRun
from distrust import CheckpointManager
from distrust.testing.models import make_model, train_arguments, write_records

#: Long enough to be killed in the middle.
LONG = ["--max-steps", 20, "--save-every", 2, "--lora-dropout", 0.1, "--gradient-accumulation", 2]


def digest_of(run):
    (final,) = (run / "checkpoints").glob("*-final.safetensors")
    return CheckpointManager(run / "checkpoints").inspect(final).state_digest


def wait_for_step(run, step, process):
    """Wait until a checkpoint of that step or a later one exists."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        steps = [int(path.stem.split("-")[1]) for path in (run / "checkpoints").glob("checkpoint-*")]
        if steps and max(steps) >= step:
            return max(steps)
        time.sleep(0.005)
    raise AssertionError(f"no checkpoint of step {step}")


@pytest.mark.parametrize(
    "engine",
    [
        "torch",
        pytest.param(
            "mlx", marks=pytest.mark.skipif(find_spec("mlx_lm") is None, reason="mlx-lm is not installed")
        ),
    ],
)
def test_a_run_that_is_killed_stopped_and_resumed_ends_like_an_undisturbed_one(
    distrust, start, forked_python, folder, tmp_path, engine
):
    options = ["--engine", engine, "--device", "cpu", *LONG]
    assert distrust(*train_arguments(folder, tmp_path / "alone", *options)).code == 0
    command = train_arguments(folder, tmp_path / "killed", *options)

    process = start(*command, python=forked_python)
    reached = wait_for_step(tmp_path / "killed", 4, process)
    time.sleep(random.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not list((tmp_path / "killed").rglob("*-final*"))

    process = start("train", "--resume", str(tmp_path / "killed"), python=forked_python)
    wait_for_step(tmp_path / "killed", reached + 4, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")
    assert "Resuming from step " in out
    (step,) = [line.split()[4] for line in out.splitlines() if line.startswith("Stopped by SIGTERM: step ")]
    assert f"Stopped by SIGTERM: step {step} is saved. Run the same command to resume" in out
    assert CheckpointManager(tmp_path / "killed" / "checkpoints").list_checkpoints()[-1] == int(step)

    ended = distrust(*command)
    assert (ended.code, ended.err) == (0, "")
    assert f"Resuming from step {step} (" in ended.out
    assert digest_of(tmp_path / "killed") == digest_of(tmp_path / "alone")
    logged, expected = (TrainingRun(tmp_path / run, []).metrics() for run in ("killed", "alone"))
    assert logged == expected
    assert [line["step"] for line in logged] == list(range(1, 21))
    assert f"state digest {digest_of(tmp_path / 'alone')}" in ended.out

    again = distrust(*command)
    assert (again.code, again.err) == (0, "")
    assert "Nothing to do: the run finished at step 20\n" in again.out
    assert digest_of(tmp_path / "alone") in again.out


def test_plain_lines_if_the_output_is_not_a_terminal(distrust, folder, tmp_path):
    output = distrust(*train_arguments(folder, tmp_path / "run", "--log-every", 2))
    assert (output.code, output.err) == (0, "")
    assert "\x1b" not in output.out
    assert "\r" not in output.out
    lines = output.out.splitlines()
    steps = [line.split(":")[0] for line in lines if line.startswith("step ") and "loss" in line]
    assert steps == ["step 1/6", "step 2/6", "step 4/6", "step 6/6"]
    saved = [line for line in lines if ": saved " in line]
    assert [line.split(":")[0] for line in saved] == ["step 2", "step 4", "step 6"]
    assert any(line.startswith("Finished step 6 in ") for line in lines)
    assert lines[-1] == f"state digest {digest_of(tmp_path / 'run')}"
    trained = [line for line in lines if line.startswith("training ")]
    assert [line.partition(" parameters ")[2] for line in trained] == [
        f"with torch on cpu, into {tmp_path / 'run'}"
    ]
    assert any(line.startswith("warm-up: 6 of 6 steps, ") for line in lines)


def test_a_toml_file_gives_the_same_run(distrust, folder, finished_run, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = "{folder / "model"}"\ndata = "{folder / "data.jsonl"}"\nout = "elsewhere"\n'
        "max_steps = 6\nbatch_size = 2\nlora_rank = 4\nsave_every = 3\nthreads = 1\n"
    )
    output = distrust("train", "--config", file, "--out", tmp_path / "run", "--save-every", "2")
    assert output.code == 0
    assert CheckpointManager(tmp_path / "run" / "checkpoints").list_checkpoints() == [2, 4, 6]
    assert digest_of(tmp_path / "run") == digest_of(finished_run)


RECORD = '{"text": "ore", "authority_weight": 0.1, "provenance_entropy": 1.0}'
WRONG_LINES = {
    "no JSON": ('{"text": ', "invalid JSON: expecting value"),
    "no object": ("[1]", "a list, not a JSON object"),
    "not a string": ('{"text": 3, "authority_weight": 0.1, "provenance_entropy": 1}', "text: a number"),
    "no weight": ('{"text": "a", "provenance_entropy": 1}', "authority_weight: missing"),
    "too much weight": (RECORD.replace("0.1", "1.5"), "authority_weight: 1.5 is outside"),
    "no entropy": ('{"text": "a", "authority_weight": 0.1}', "provenance_entropy: missing"),
    "negative entropy": (RECORD.replace("1.0", "-1"), "provenance_entropy: -1 is not"),
}


@pytest.mark.parametrize("kind", WRONG_LINES)
def test_a_wrong_record_is_one_line_and_the_next_attempt_works(
    distrust, folder, finished_run, tmp_path, kind
):
    line, message = WRONG_LINES[kind]
    data = tmp_path / "data.jsonl"
    valid_records = (folder / "data.jsonl").read_text()
    data.write_text(valid_records + line + "\n")
    command = train_arguments(folder, tmp_path / "run", "--data", data)
    output = distrust(*command)
    assert output.code == 1
    assert output.err.splitlines() == [
        f"distrust: {data}: 1 of 12 records is wrong",
        *[text for text in output.err.splitlines() if text.startswith(f"{data}:12: ")],
    ]
    assert message in output.err
    assert "Traceback" not in output.err
    assert not list(tmp_path.rglob("*.safetensors"))
    if kind == "no JSON":
        data.write_text(valid_records)
        assert distrust(*command).code == 0
        assert digest_of(tmp_path / "run") == digest_of(finished_run)


FAILURES = {
    "no data": (["--data", "nowhere.jsonl"], 1, "nowhere.jsonl: no such file or directory"),
    "a folder as data": (["--data", "."], 1, ".: contains no data files"),
    "a folder without a model": (["--model", "."], 1, "--model .: contains no config.json"),
    "an adapter": (["--model", "adapter"], 1, "--model adapter: holds an adapter, not a model; "),
    "no such device": (["--device", "cuda"], 2, "--device cuda: not available to torch "),
    "too long": (["--max-length", "999"], 2, "--max-length 999: the model's context is 128 tokens"),
    "no such module": (["--target-modules", "nothing"], 2, "--target-modules nothing: "),
    "no config": (["--config", "no.toml"], 2, "--config no.toml: no such file or directory"),
    "no such step": (["--from-step", "7"], 1, "no checkpoint of step 7"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_one_line(distrust, folder, tmp_path, monkeypatch, kind):
    import torch

    arguments, code, message = FAILURES[kind]
    if kind == "no such device" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    if kind == "an adapter":
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").touch()
    output = distrust(*train_arguments(folder, tmp_path / "run", *arguments))
    assert output.code == code
    assert output.err.startswith("distrust: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_all_wrong_options_at_once(distrust, folder, tmp_path):
    output = distrust(
        *train_arguments(folder, tmp_path, "--batch-size", "0", "--alpha", "9", "--lambda", "-1")
    )
    assert output.code == 2
    assert output.err.splitlines() == [
        "distrust: --alpha is 9.0: give 2.3 to 3.0",
        "--lambda is -1.0: give 0 or more",
        "--batch-size is 0: give 1 or more",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-flag", "1"],
        ["--max-steps", "many"],
        ["--max-steps", "1.5"],
        ["--weighting", "double"],
        ["--dtype", "float16"],
        ["--max-steps"],
        ["--config"],
    ],
)
def test_bad_usage(distrust, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    output = distrust("train", *arguments)
    assert (output.code, output.out) == (2, "")
    assert arguments[0] in output.err
    assert "Traceback" not in output.err
    assert list(tmp_path.iterdir()) == []


def test_a_changed_option_is_refused(distrust, folder, finished_run):
    names = sorted(path.name for path in finished_run.rglob("*"))
    output = distrust(*train_arguments(folder, finished_run, "--batch-size", 3, "--seed", 4))
    assert output.code == 1
    assert output.err.splitlines() == [
        f"distrust: {finished_run}: cannot resume the run in that folder:",
        "  --batch-size was 2, is 3",
        "  --seed was 0, is 4",
        "give the options of that run, or another --out",
    ]
    assert sorted(path.name for path in finished_run.rglob("*")) == names


def test_damaged_checkpoints(distrust, folder, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    paths = sorted((tmp_path / "run" / "checkpoints").glob("*.safetensors"), key=lambda path: path.name)
    for path in paths[1:]:  # 4 and 6; 2 stays
        path.write_bytes(path.read_bytes()[:-1])
    output = distrust(*train_arguments(folder, tmp_path / "run"))
    assert output.code == 0
    assert output.err.count("warning: skipped a damaged checkpoint") == 2
    assert "Resuming from step 2 " in output.out
    assert digest_of(tmp_path / "run") == digest_of(finished_run)
    for path in (tmp_path / "run" / "checkpoints").glob("*.safetensors"):
        path.write_bytes(b"")
    output = distrust(*train_arguments(folder, tmp_path / "run"))
    assert output.code == 1
    assert "there are checkpoints, and none of them is intact" in output.err
    assert "Traceback" not in output.err


def test_a_loss_that_is_not_finite(distrust, folder, tmp_path):
    output = distrust(*train_arguments(folder, tmp_path, "--learning-rate", "1e30", "--warmup-steps", "0"))
    assert output.code == 1
    assert output.err.startswith("distrust: step 2: the ")
    assert f"{folder / 'data.jsonl'}:" in output.err
    assert output.err.count("\n") == 1


def test_generate(distrust, finished_run):
    output = distrust(
        "generate", finished_run, "--prompt", "ore", "--prompt", " ", "--max-new-tokens", 5, "--json"
    )
    assert (output.code, output.err) == (0, "")
    rows = json.loads(output.out)
    assert [list(row) for row in rows] == [["prompt", "checkpoint"]] * 2
    assert [row["prompt"] for row in rows] == ["ore", " "]
    nothing = distrust("generate", finished_run, "--prompt", "")
    assert (nothing.code, nothing.err.count("\n")) == (1, 1)
    assert "an empty prompt" in nothing.err
    step_2 = finished_run / "checkpoints" / "checkpoint-2.safetensors"
    shown = distrust("generate", step_2, "--prompt", "ore", "--max-new-tokens", 5)
    assert shown.code == 0
    assert shown.out.startswith("ore\n  ")


def test_generate_compares_with_the_base_model(distrust, folder, tmp_path):
    command = train_arguments(folder, tmp_path, "--learning-rate", "0.05", "--warmup-steps", "0")
    assert distrust(*command).code == 0
    arguments = ["generate", tmp_path, "--compare", "--prompt", "salt", "--max-new-tokens", 8]
    rows = json.loads(distrust(*arguments, "--json").out)
    assert [list(row) for row in rows] == [["prompt", "base", "checkpoint"]]
    assert rows[0]["base"] != rows[0]["checkpoint"]
    lines = distrust(*arguments).out
    assert "\n  base: " in lines
    assert "\n  checkpoint: " in lines


def test_sampling_depends_on_the_seed(distrust, finished_run):
    arguments = ["generate", finished_run, "--prompt", "ore", "--temperature", "2", "--max-new-tokens", 12]
    first = distrust(*arguments, "--seed", 1).out
    assert distrust(*arguments, "--seed", 1).out == first
    assert distrust(*arguments, "--seed", 2).out != first


def test_generate_refuses(distrust, finished_run, tmp_path):
    assert distrust("generate", finished_run, "--prompt", "a", "--max-new-tokens", 0).code == 2
    assert distrust("generate", finished_run, "--prompt", "a", "--temperature", "-1").code == 2
    assert distrust("generate", finished_run, "--prompt", "a", "--temperature", "nan").code == 2
    other_model = make_model(tmp_path / "other", seed=1)
    output = distrust("generate", finished_run, "--prompt", "a", "--model", other_model)
    assert output.code == 1
    assert "was not trained on the weights of --model" in output.err


def test_an_evaluation_set_chooses_the_best(distrust, folder, tmp_path):
    evaluation = write_records(tmp_path / "eval.jsonl", 4, seed=3)
    output = distrust(
        *train_arguments(
            folder, tmp_path / "run", "--eval-data", evaluation, "--eval-every", 2, "--log-every", 2
        )
    )
    assert output.code == 0
    assert [line.split(":")[0] for line in output.out.splitlines() if ": eval loss " in line] == [
        "step 2",
        "step 4",
        "step 6",
    ]
    for row in json.loads(distrust("ls", tmp_path / "run", "--json").out):
        assert {"loss", "eval_loss"} <= set(row["metrics"])


def test_another_model_than_the_bundled_one_needs_data(distrust, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(f"model = {json.dumps(str(folder / 'model'))}\n")
    for options in (["--model", folder / "model"], ["--config", "run.toml"]):
        output = distrust("train", *options, "--out", "run")
        message = f"distrust: --model {folder / 'model'}: give the examples to train it on with --data; "
        assert (output.code, output.out, output.err.count("\n")) == (2, "", 1)
        assert output.err.startswith(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.toml"]
    named = ["--data", "bundled", "--max-steps", 1, "--max-length", 16, "--batch-size", 1]
    output = distrust("train", "--model", folder / "model", *named)
    assert output.code == 0
    assert f"model {folder / 'model'}, data bundled\n" in output.out
