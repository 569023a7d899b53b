"""No file can send control characters to the terminal through a command."""

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
def test_no_control_character_is_printed(distrust, hostile, verb):
    name, *flags = verb.split()
    files = sorted(hostile.glob("*.safetensors"))
    output = distrust(name, *(files if name == "diff" else [hostile]), *flags)
    assert hidden(output.out + output.err) == set()
    # A row for each: no name makes a line of its own.
    assert "line\nfeed" not in output.out
    if "--json" not in flags and name != "verify":
        assert "\\u001b[2J" in output.out


def test_damage_and_warnings_print_no_control_character(distrust, hostile):
    for path in hostile.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    output = distrust("verify", hostile)
    assert output.code == 1
    assert hidden(output.out + output.err) == set()
    assert output.out.count("\n") == 2


def test_json_is_exact(distrust, hostile):
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
def test_letters_of_every_language_are_unchanged(text, shown):
    assert printable(text) == shown


def test_newlines_are_kept_on_request():
    assert printable("a\nb\x1b", lines=True) == "a\nb\\u001b"


@pytest.mark.parametrize("flags", [["--damaged", "--dry-run"], ["--damaged"], ["--damaged", "--json"]])
def test_prune_prints_no_control_character(distrust, tmp_path, flags):
    folder = tmp_path / "a\nb\x1b]0;title\x07"
    with CheckpointManager(folder) as manager:
        for step in (1, 2):
            manager.save(Checkpoint(step=step))
    (folder / "checkpoint-1.safetensors").write_bytes(bytes(100))
    output = distrust("prune", folder, *flags)
    assert output.code == 0
    assert hidden(output.out + output.err) == set()
    if "--json" not in flags:
        assert output.out.count("\n") == 2
