"""``distrust eval``: the losses of a trained model, the same that its run was told."""

from __future__ import annotations

import json

import pytest

from distrust.testing.models import train_arguments, write_records


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def evaluated(folder, tmp_path_factory):
    """A run that was evaluated at each second step, on records of two source classes."""
    from distrust.cli import main

    place = tmp_path_factory.mktemp("eval")
    records = read_lines(write_records(place / "plain.jsonl", 7, seed=3))
    rows = [{**record, "kind": "press" if number % 3 else "log"} for number, record in enumerate(records)]
    (place / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--eval-data", place / "eval.jsonl", "--eval-every", 2, "--source-column", "kind"]
    more += ["--learning-rate", 0.05, "--warmup-steps", 0]
    assert main(train_arguments(folder, place / "run", *more)) == 0
    return place / "run"


def logged(run):
    return {line["step"]: line for line in read_lines(run / "metrics.jsonl") if "eval_loss" in line}


def test_it_says_what_the_run_said_to_the_last_bit(distrust, evaluated):
    for step, line in logged(evaluated).items():
        given = distrust("eval", evaluated, "--step", step, "--json")
        assert given.code == 0, given.err
        found = json.loads(given.out)["checkpoint"]
        assert (found.pop("examples"), found.pop("tokens") > 0) == (7, True)
        assert {"step": step, **found} == line
        assert {"eval_loss/press", "eval_loss/log"} <= found.keys()


def test_other_data_beside_the_base_model(distrust, evaluated, folder):
    given = distrust("eval", evaluated, "--data", folder / "data.jsonl", "--compare")
    assert given.code == 0, given.err
    assert given.out.index("base:") < given.out.index("checkpoint:")
    losses = [float(line.split()[1]) for line in given.out.splitlines() if line.startswith("all ")]
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--data", "nowhere.jsonl"], 1, "nowhere.jsonl: no such file or directory"),
        (["--data", "bundled", "--batch-size", 0], 2, "--batch-size is 0: give 1 or more"),
        (["--step", 3], 1, "no checkpoint of step 3; there are 2, 4, 6"),
    ],
)
def test_what_is_wrong_is_one_line(distrust, evaluated, more, code, says):
    given = distrust("eval", evaluated, *more)
    assert (given.code, given.err.count("\n"), given.out) == (code, 1, "")
    assert says in given.err


def test_without_data_it_asks_for_some(distrust, finished):
    given = distrust("eval", finished)
    assert (given.code, given.err) == (2, "distrust: there is nothing to evaluate on; name it with --data\n")


@pytest.fixture
def kept_out(folder, tmp_path):
    """A run that keeps a part of its data out, and that data."""
    from distrust.cli import main

    data = tmp_path / "data.jsonl"
    data.write_bytes((folder / "data.jsonl").read_bytes())
    more = ["--data", data, "--eval-fraction", 0.3, "--eval-every", 3]
    assert main(train_arguments(folder, tmp_path / "run", *more)) == 0
    return tmp_path / "run", data


def test_what_the_run_kept_out_is_found_again(distrust, kept_out):
    run, data = kept_out
    given = distrust("eval", run, "--json")
    assert given.code == 0, given.err
    found = json.loads(given.out)
    assert found["step"] == 6
    assert found["checkpoint"].items() > {k: v for k, v in logged(run)[6].items() if k != "step"}.items()
    assert found["checkpoint"]["examples"] < len(read_lines(data))


def test_of_other_data_nobody_knows_what_was_kept_out(distrust, kept_out):
    run, data = kept_out
    lines = data.read_text("utf-8").splitlines(keepends=True)
    data.write_text("".join(lines[:-1]), "utf-8")
    given = distrust("eval", run)
    assert (given.code, given.out) == (1, "")
    assert given.err.splitlines()[-1] == (
        f"distrust: {data}: not the data that the run was trained on, so the examples "
        "that it held out are not known; name the evaluation data with --data"
    )
    assert distrust("eval", run, "--data", data).code == 0
