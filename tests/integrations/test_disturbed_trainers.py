"""Trainers of transformers and TRL that are killed end as a plain Trainer does that nobody disturbs.

Every run is a process, a fork of one that has imported the libraries. Here are the cases that differ in what
we do; ``campaigns.integrations`` kills each of its cases, at random.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from campaigns.integrations import protocol
from campaigns.integrations.cases import BY_NAME, CASES, RANDOM_DATA, Case, Kill
from campaigns.session import Forks, Session

pytest.importorskip("trl")

End = dict[str, Any]
#: (folder, case, keeper, kill) -> the step at which the process began, or None if it trained nothing
Start = Callable[..., int | None]
#: With only other data, or with what two of the rest have together.
LEFT_TO_THE_CAMPAIGN = (
    "Trainer, 2 workers", "Trainer, accumulation, 2 workers", "Trainer, evaluation",
    "SFTTrainer, accumulation, evaluation, 2 workers",
    "SFTTrainer, completions", "SFTTrainer, assistant's turns",
)  # fmt: skip
DISTURBED = [case for case in CASES if case.name not in LEFT_TO_THE_CAMPAIGN]
#: A killed run begins as one that is only attached. These differ where a run is not resumed.
ATTACHED = (
    "Trainer",
    "Trainer, best model at the end",
    "Trainer, streamed, three passes, 2 workers",
    "DPOTrainer",
)
names = {"ids": lambda case: case.name.replace(", ", "-").replace(" ", "_")}


@pytest.fixture(scope="module")
def start(forked_python) -> Iterator[Start]:
    """Runs a case once, until it ends or kills itself; returns the step at which it began."""

    def start(folder: Path, case: Case, keeper: str, kill: Kill | None = None) -> int | None:
        folder.mkdir(exist_ok=True)
        arguments = [case.name, keeper, str(folder), *([kill.text] if kill else [])]
        session = Session(forks, arguments, folder=folder, directory=folder / protocol.CHECKPOINTS)
        code = session.wait()
        killed = kill is not None and kill.moment != "stop"
        assert code == (-9 if killed else 0), session.errors()
        began = re.search(r"^begins at (\d+)$", "\n".join(session.output()), re.MULTILINE)
        return int(began[1]) if began else None

    imports = (*protocol.IMPORTS, "tests.without_fsync")
    with Forks(protocol.PROGRAM, imports, name="a fork", python=[forked_python]) as forks:
        yield start


def end_of(folder: Path) -> End:
    return json.loads((folder / protocol.END).read_text())


def differences(end: End, expected: End) -> dict[str, list[Any]]:
    """What differs, as [of this run, of the other]."""
    assert end.keys() == expected.keys()
    return {name: [end[name], expected[name]] for name in end if end[name] != expected[name]}


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory) -> Callable[[Case], End]:
    """The end of a run that nobody disturbs, without ours unless its random numbers are to be ours."""
    ends: dict[str, End] = {}

    def run(case: Case) -> End:
        if case.name not in ends:
            folder = tmp_path_factory.mktemp("undisturbed")
            start(folder, case, "distrust" if case.pure_data else "nobody")
            ends[case.name] = end_of(folder)
        return ends[case.name]

    return run


def disturb(
    start: Start, folder: Path, case: Case, keeper: str, kills: Sequence[Kill]
) -> tuple[End, list[int]]:
    """Kill it at each moment in turn, then let it end; also where each process but the first began."""
    _, *began = [start(folder, case, keeper, kill) for kill in (*kills, None)]
    return end_of(folder), began


@pytest.mark.parametrize("case", [*(BY_NAME[name] for name in ATTACHED), RANDOM_DATA], **names)
def test_attaching_changes_no_bit(start, reference, tmp_path, case):
    assert start(tmp_path / "attached", case, "distrust") == 0
    assert differences(end_of(tmp_path / "attached"), reference(case)) == {}


@pytest.mark.parametrize("case", DISTURBED, **names)
def test_a_killed_run_ends_as_an_undisturbed_one(start, reference, tmp_path, case):
    end, began = disturb(start, tmp_path / "killed", case, "distrust", case.kills)
    assert 0 < began[0] <= began[1] <= end["step"], began  # a save may be unfinished when its process dies
    assert differences(end, reference(case)) == {}


@pytest.mark.parametrize(
    ("name", "kill"),
    [
        ("Trainer", None),  # ends within a pass
        ("Trainer, accumulation", None),  # ends with a pass
        ("SFTTrainer, packing", Kill("save", 12)),  # after the last step
    ],
)
def test_a_finished_run_is_not_trained_any_further(start, reference, tmp_path, name, kill):
    case = BY_NAME[name]
    for stop in (kill, None):
        start(tmp_path / "finished", case, "distrust", stop)
    assert differences(end_of(tmp_path / "finished"), reference(case)) == {}


def test_the_best_model_is_not_the_last(reference):
    """Else the case of ``load_best_model_at_end`` would show nothing."""
    end = reference(BY_NAME["Trainer, best model at the end"])
    assert 0 < end["best"][0] < end["step"]


def test_random_data_is_exact_only_if_pure(start, reference, tmp_path):
    end, _ = disturb(start, tmp_path / "killed", RANDOM_DATA, "distrust", RANDOM_DATA.kills)
    assert "weights" in differences(end, reference(RANDOM_DATA))


@pytest.mark.parametrize(
    ("name", "inexact"),
    [
        ("Trainer", {"log_history", "train_loss"}),
        ("Trainer, grouped by length", {"log_history", "train_loss", "weights", "moments"}),
    ],
)
def test_what_the_trainers_own_resume_changes(start, reference, tmp_path, name, inexact):
    """These runs can differ: kills that changed nothing would show nothing."""
    case = BY_NAME[name]
    kills = [kill for kill in case.kills if kill.moment != "save"]
    end, began = disturb(start, tmp_path / "killed", case, "trainer", kills)
    assert began[0] > 0
    assert set(differences(end, reference(case))) >= inexact
