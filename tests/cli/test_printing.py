"""No file can send control characters to the terminal through a command."""

from __future__ import annotations

import copy
import json
import pickle
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust import Checkpoint, CheckpointManager
from distrust.errors import ConfigError, DataError, DistrustWarning, ResumeRefused, printable
from run_folders import write_run

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


FORGED = "distrust: forged"
NAME = f"x\n{FORGED}"


@pytest.fixture
def two_line_names(tmp_path):
    """A folder with a run, data and tables, each named like two lines, and all wrong somewhere."""
    folder = tmp_path / NAME
    run = write_run(folder / NAME, steps=40)
    (run / "checkpoints" / "checkpoint-20.safetensors").write_bytes(b"cut")
    (folder / "data.jsonl").write_text('{"text": 1}\n{"text": "a"}\n')
    for name in ("table.toml", "config.toml"):
        (folder / name).write_text("unknown = 1\nother = 2\n")
    (folder / "model").mkdir()
    return folder


COMMANDS = """
ls RUN; ls FOLDER/none; show RUN; show FOLDER/none; verify RUN; diff RUN FOLDER/none; prune RUN --damaged
plot RUN --panels lr; plot FOLDER/none; report FOLDER; convert FOLDER/none --to FOLDER/a
convert RUN --to FOLDER/converted; weigh FOLDER/data.jsonl; weigh FOLDER/none.jsonl
weigh FOLDER/data.jsonl --table FOLDER/table.toml; export RUN --to FOLDER/data.jsonl
generate FOLDER/none --prompt a; train --model FOLDER/model --out FOLDER/new
train --data FOLDER/data.jsonl --out FOLDER/new; train --config FOLDER/config.toml
"""


@pytest.mark.parametrize("command", re.split("[;\n] *", COMMANDS.strip()))
def test_a_newline_in_a_name_forges_no_line(distrust, two_line_names, command):
    paths = {"FOLDER": str(two_line_names), "RUN": str(two_line_names / NAME)}
    arguments = []
    for word in command.split():
        first, slash, name = word.partition("/")
        arguments.append(paths.get(first, first) + slash + name)
    output = distrust(*arguments)
    printed = output.out + output.err
    assert FORGED in printed  # it names what it is about
    assert not [line for line in printed.splitlines() if line.startswith(FORGED)]


@given(st.lists(st.text(), min_size=1))
def test_a_message_has_as_many_lines_as_it_was_given(lines):
    for kind in (ConfigError, DataError, ResumeRefused, DistrustWarning):
        assert len(str(kind(lines)).split("\n")) == len(lines)
        assert hidden(str(kind(lines[0]))) == set()
        error = kind(lines)
        for copied in (copy.copy(error), pickle.loads(pickle.dumps(error))):  # as between processes
            assert str(copied) == str(error)


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
