"""What the commands print of a file commands no terminal."""

from __future__ import annotations

import json
import unicodedata

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager
from distrust.reporting.display import printable

COMMAND = "\x1b[2J\x9b\u202e\x07\x7f"


@pytest.fixture
def hostile(tmp_path):
    """Two checkpoints full of commands; everything in them is allowed."""
    with CheckpointManager(tmp_path, keep_last=None) as manager:
        for step in (1, 2):
            manager.save(
                Checkpoint(
                    step=step,
                    model={COMMAND: np.full(3, step)},
                    config={COMMAND: COMMAND},
                    metadata={COMMAND: COMMAND * step, "line\nfeed": "a\nb"},
                    metrics={COMMAND: 1.0},
                    run={COMMAND: COMMAND},
                )
            )
    return tmp_path


def hidden(text: str) -> set[str]:
    return {letter for letter in text if unicodedata.category(letter) in {"Cc", "Cf", "Cs"}} - {"\n"}


@pytest.mark.parametrize(
    "verb", ["ls", "show", "show --tensors", "show --json", "diff", "diff --json", "verify"]
)
def test_nothing_is_printed_that_a_terminal_obeys(distrust, hostile, verb):
    name, *flags = verb.split()
    files = sorted(hostile.glob("*.safetensors"))
    given = distrust(name, *(files if name == "diff" else [hostile]), *flags)
    assert hidden(given.out + given.err) == set()
    # A row for each: no name makes a line of its own.
    assert "line\nfeed" not in given.out
    if "--json" not in flags and name != "verify":
        assert "\\u001b[2J" in given.out


def test_damage_and_warnings_command_nothing_either(distrust, hostile):
    for path in hostile.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    given = distrust("verify", hostile)
    assert given.code == 1
    assert hidden(given.out + given.err) == set()
    assert given.out.count("\n") == 2


def test_json_says_what_the_file_says(distrust, hostile):
    shown = json.loads(distrust("show", hostile, "--json").out)
    assert shown["metadata"] == {COMMAND: COMMAND * 2, "line\nfeed": "a\nb"}
    assert shown["tensors"][0]["name"] == f"model.{COMMAND}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("é 漢\u3000字 😀", "é 漢\u3000字 😀"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\U000e0001\udcff", "\\udb40\\udc01\\udcff"),
    ],
)
def test_letters_of_every_language_stay(text, shown):
    assert printable(text) == shown


def test_lines_stay_where_they_may():
    assert printable("a\nb\x1b", lines=True) == "a\nb\\u001b"


@pytest.mark.parametrize("flags", [["--damaged", "--dry-run"], ["--damaged"], ["--damaged", "--json"]])
def test_what_goes_commands_nothing_either(distrust, tmp_path, flags):
    folder = tmp_path / "a\nb\x1b]0;title\x07"
    with CheckpointManager(folder) as manager:
        for step in (1, 2):
            manager.save(Checkpoint(step=step))
    (folder / "checkpoint-1.safetensors").write_bytes(bytes(100))
    given = distrust("prune", folder, *flags)
    assert given.code == 0
    assert hidden(given.out + given.err) == set()
    if "--json" not in flags:
        assert given.out.count("\n") == 2
