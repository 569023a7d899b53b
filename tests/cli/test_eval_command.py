"""``distrust eval``: the losses of a trained model equal those that its run logged."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from distrust import CheckpointManager
from distrust.testing.models import train_arguments, write_records


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def evaluated_run(folder, tmp_path_factory):
    """A run that was evaluated at each second step, on records of two source classes."""
    from distrust.cli import main

    directory = tmp_path_factory.mktemp("eval")
    records = read_lines(write_records(directory / "plain.jsonl", 7, seed=3))
    rows = [{**record, "kind": "press" if number % 3 else "log"} for number, record in enumerate(records)]
    (directory / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--eval-data", directory / "eval.jsonl", "--eval-every", 2, "--source-column", "kind"]
    options += ["--learning-rate", 0.05, "--warmup-steps", 0]
    assert main(train_arguments(folder, directory / "run", *options)) == 0
    return directory / "run"


def read_evaluations(run):
    return {line["step"]: line for line in read_lines(run / "metrics.jsonl") if "eval_loss" in line}


def test_it_repeats_the_evaluation_of_the_run_to_the_last_bit(distrust, evaluated_run):
    for step, line in read_evaluations(evaluated_run).items():
        output = distrust("eval", evaluated_run, "--step", step, "--json")
        assert output.code == 0, output.err
        result = json.loads(output.out)["checkpoint"]
        assert (result.pop("examples"), result.pop("tokens") > 0) == (7, True)
        assert {"step": step, **result} == line
        assert {"eval_loss/press", "eval_loss/log"} <= result.keys()


def test_other_data_compared_with_the_base_model(distrust, evaluated_run, folder):
    output = distrust("eval", evaluated_run, "--data", folder / "data.jsonl", "--compare")
    assert output.code == 0, output.err
    assert output.out.index("base:") < output.out.index("checkpoint:")
    losses = [float(line.split()[1]) for line in output.out.splitlines() if line.startswith("all ")]
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--data", "nowhere.jsonl"], 1, "nowhere.jsonl: no such file or directory"),
        (["--data", "bundled", "--batch-size", 0], 2, "--batch-size is 0: give 1 or more"),
        (["--step", 3], 1, "no checkpoint of step 3; there are 2, 4, 6"),
    ],
)
def test_a_mistake_is_reported_in_one_line(distrust, evaluated_run, options, code, message):
    output = distrust("eval", evaluated_run, *options)
    assert (output.code, output.err.count("\n"), output.out) == (code, 1, "")
    assert message in output.err


def test_without_data_it_asks_for_data(distrust, finished_run):
    output = distrust("eval", finished_run)
    assert (output.code, output.err) == (
        2,
        "distrust: there is nothing to evaluate on; name it with --data\n",
    )


@pytest.fixture
def held_out(folder, tmp_path):
    """A run that keeps a part of its data out, and that data."""
    from distrust.cli import main

    data = tmp_path / "data.jsonl"
    data.write_bytes((folder / "data.jsonl").read_bytes())
    options = ["--data", data, "--eval-fraction", 0.3, "--eval-every", 3]
    assert main(train_arguments(folder, tmp_path / "run", *options)) == 0
    return tmp_path / "run", data


def test_the_held_out_examples_are_evaluated_again(distrust, held_out):
    run, data = held_out
    output = distrust("eval", run, "--json")
    assert output.code == 0, output.err
    result = json.loads(output.out)
    assert result["step"] == 6
    assert (
        result["checkpoint"].items()
        > {k: v for k, v in read_evaluations(run)[6].items() if k != "step"}.items()
    )
    assert result["checkpoint"]["examples"] < len(read_lines(data))


def test_the_held_out_examples_of_changed_data_are_unknown(distrust, held_out):
    run, data = held_out
    lines = data.read_text("utf-8").splitlines(keepends=True)
    data.write_text("".join(lines[:-1]), "utf-8")
    output = distrust("eval", run)
    assert (output.code, output.out) == (1, "")
    assert output.err.splitlines()[-1] == (
        f"distrust: {data}: not the data that the run was trained on, so the examples "
        "that it held out are not known; name the evaluation data with --data"
    )
    assert distrust("eval", run, "--data", data).code == 0


@pytest.fixture
def craft(finished_run, tmp_path):
    """Saves the newest checkpoint of the run again, with other options of its machine."""

    def craft(**options):
        checkpoint = CheckpointManager(finished_run / "checkpoints").load_latest()
        with CheckpointManager(tmp_path / "crafted" / "checkpoints") as manager:
            manager.save(replace(checkpoint, run={**checkpoint.run, **options}))
        return tmp_path / "crafted"

    return craft


def test_a_checkpoint_does_not_choose_where_this_machine_writes(distrust, craft, folder, tmp_path):
    named = tmp_path / "named"
    data = str(folder / "data.jsonl")
    options = {"cache_dir": str(named), "out": str(named), "threads": 10**6, "max_record_bytes": 1}
    run = craft(eval_data=data, compile=True, **options)
    output = distrust("eval", run)
    assert output.code == 0, output.err
    assert f"evaluating on {data}, as the checkpoint says\n" in output.err
    assert not named.exists()
    assert distrust("eval", run, "--cache-dir", tmp_path / "cache").code == 0
    assert any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", ["owner/dataset", "{}/pipe", "/dev/zero", "{}/nothing.jsonl", "a\0b"])
def test_a_checkpoint_names_no_other_data_than_files(distrust, craft, tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    name = name.format(tmp_path)
    output = distrust("eval", craft(eval_data=name))
    shown = name if name.isprintable() else repr(name)
    assert (output.code, output.out, output.err.count("\n")) == (1, "", 1)
    assert f"{shown}: the checkpoint names it as the evaluation data, and it is no file" in output.err
