"""The commands on files, and what all commands have in common."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from distrust import Checkpoint, CheckpointManager
from distrust.cli import COMMANDS

HEX = re.compile("[0-9a-f]{64}")


def damage(path):
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def copy(finished_run, tmp_path):
    """The run, to be spoiled."""
    return shutil.copytree(finished_run, tmp_path / "copy")


@pytest.mark.parametrize("verb", COMMANDS)
def test_each_command_has_help_with_examples(distrust, verb):
    output = distrust(verb, "--help")
    assert output.code == 0
    assert output.err == ""
    _, _, examples = output.out.partition("examples:")
    assert f"distrust {verb}" in examples


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_names_every_command(distrust, flag):
    output = distrust(flag)
    assert output.code == 0
    for verb, purpose in COMMANDS.items():
        assert f"  {verb}" in output.out
        assert purpose in output.out
    assert distrust().out == output.out
    assert distrust().code == 2


def test_version(distrust):
    from distrust import __version__

    assert distrust("--version").out == f"distrust {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("trian", "did you mean train?"), ("lss", "did you mean ls?"), ("xyz", "there are demo, ")],
)
def test_an_unknown_command(distrust, typed, hint):
    output = distrust(typed)
    assert (output.code, output.out) == (2, "")
    assert output.err.startswith(f"distrust: no command {typed!r}; {hint}")
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls"],
        ["show"],
        ["verify"],
        ["prune"],
        ["diff", "a"],
        ["generate"],
        ["generate", "a", "--checkpoint", "b"],
        ["generate", "a", "--step", "1", "--best"],
        ["export", "a"],
        ["export", "a", "--to", "b", "--format", "gguf"],
        ["ls", "--nonsense", "a"],
        ["show", "a", "--step", "x"],
    ],
)
def test_bad_usage(distrust, arguments):
    output = distrust(*arguments)
    assert (output.code, output.out) == (2, "")
    assert f"usage: distrust {arguments[0]}" in output.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls"],
        ["show"],
        ["verify"],
        ["prune", "--damaged"],
        ["diff", "here"],
        ["show", "--step", "4"],
        ["plot"],
        ["report"],
        ["generate", "--prompt", "a"],
        ["export", "--to", "x"],
    ],
)
def test_a_missing_target(distrust, finished_run, tmp_path, arguments):
    verb, *options = [str(finished_run) if argument == "here" else argument for argument in arguments]
    output = distrust(verb, *options, tmp_path / "nowhere")
    assert (output.code, output.out) == (1, "")
    assert output.err == f"distrust: {tmp_path}/nowhere: no such file or directory\n"


@pytest.mark.parametrize("verb", ["show", "verify", "generate"])
def test_a_folder_without_checkpoints(distrust, tmp_path, verb):
    output = distrust(verb, tmp_path)
    assert (output.code, output.out) == (1, "")
    assert output.err == f"distrust: {tmp_path}: no checkpoints here\n"


def test_ls_of_a_folder_without_checkpoints(distrust, tmp_path):
    assert distrust("ls", tmp_path).out == f"no checkpoints in {tmp_path}\n"
    assert json.loads(distrust("ls", tmp_path, "--json").out) == []


ELSEWHERE = {
    "a folder of the transformers Trainer": ["checkpoint-5/trainer_state.json"],
    "a folder of the transformers Trainer: distrust convert ": ["trainer_state.json", "adapter_config.json"],
    "an adapter folder of peft": ["adapter_config.json", "adapter_model.safetensors"],
    "an adapter folder of mlx-lm": ["adapter_config.json", "adapters.safetensors"],
}


@pytest.mark.parametrize("purpose", ELSEWHERE)
def test_a_folder_of_another_program_is_recognised(distrust, tmp_path, purpose):
    folder = tmp_path / "out put"
    for name in ELSEWHERE[purpose]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    command = f"distrust convert '{folder}' --to RUN converts it\n"
    listed = distrust("ls", folder)
    assert (listed.code, listed.err) == (0, "")
    for message in (listed.out, *(distrust(verb, folder).err for verb in ("show", "verify"))):
        assert f"; it is {purpose}" in message
        assert message.endswith(command)
        assert message.count("\n") == 1
    assert distrust("ls", folder, "--json").out == "[]\n"


def test_the_newest_checkpoint_of_a_trainers_folder_with_an_adapter_is_suggested(distrust, tmp_path):
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").touch()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).touch()
    assert f"distrust convert {tmp_path}/checkpoint-10 --to RUN" in distrust("ls", tmp_path).out


def test_ls(distrust, finished_run):
    output = distrust("ls", finished_run, "--json")
    assert (output.code, output.err) == (0, "")
    rows = json.loads(output.out)
    assert [(row["step"], row["kind"]) for row in rows] == [(2, "periodic"), (4, "periodic"), (6, "final")]
    for row in rows:
        assert list(row) == ["step", "kind", "path", "format", "bytes", "created", "metrics"]
        path = finished_run / "checkpoints" / row["path"].rpartition("/")[2]
        assert row["path"] == str(path)
        assert row["bytes"] == path.stat().st_size
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", row["created"])
        assert isinstance(row["metrics"]["loss"], float)
    for target in (finished_run / "checkpoints", finished_run):
        lines = distrust("ls", target).out.splitlines()
        assert [line.split()[0] for line in lines] == ["step", "2", "4", "6"]
    (row,) = json.loads(distrust("ls", rows[1]["path"], "--json").out)
    assert row == rows[1]


def test_ls_of_a_folder_of_runs_lists_the_runs(distrust, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "b")
    shutil.copytree(finished_run, tmp_path / "a\x1b[31m")
    (tmp_path / "b" / "checkpoints" / "checkpoint-6-final.safetensors").write_bytes(b"")
    (tmp_path / "started" / "checkpoints").mkdir(parents=True)
    (tmp_path / "no run").mkdir()
    output = distrust("ls", tmp_path)
    assert (output.code, output.err) == (0, "")
    header, *rows = output.out.splitlines()
    assert header.split() == ["run", "step", "kind", "created", "(UTC)", "checkpoints"]
    created = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
    assert [created.sub("DATE", row).split() for row in rows] == [
        ["a\\u001b[31m", "6", "final", "DATE", "3"],
        ["b", "4", "periodic", "DATE", "2,", "1", "damaged"],
        ["started", "-", "-", "-", "0"],
    ]
    rows = json.loads(distrust("ls", tmp_path, "--json").out)
    assert [list(row) for row in rows] == [["run", "step", "kind", "created", "checkpoints", "damaged"]] * 3
    assert [(row["run"], row["step"], row["kind"]) for row in rows] == [
        (str(tmp_path / "a\x1b[31m"), 6, "final"),
        (str(tmp_path / "b"), 4, "periodic"),
        (str(tmp_path / "started"), None, None),
    ]
    assert [(row["checkpoints"], row["damaged"]) for row in rows] == [(3, 0), (2, 1), (0, 0)]


def test_ls_warns_about_damage(distrust, copy):
    path = copy / "checkpoints" / "checkpoint-4.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    output = distrust("ls", copy, "--json")
    assert output.code == 0
    assert [row["step"] for row in json.loads(output.out)] == [2, 6]
    assert output.err.startswith(f"distrust: warning: {path}: damaged: ")
    assert output.err.count("\n") == 1


def test_show(distrust, finished_run):
    path = finished_run / "checkpoints" / "checkpoint-6-final.safetensors"
    output = distrust("show", finished_run, "--json")
    assert (output.code, output.err) == (0, "")
    shown = json.loads(output.out)
    keys = {"path", "format", "step", "kind", "digest", "state_digest", "metadata", "tensors"}
    assert set(shown) == keys | {"config", "run"}
    assert (shown["path"], shown["step"], shown["kind"]) == (str(path), 6, "final")
    assert HEX.fullmatch(shown["digest"])
    assert HEX.fullmatch(shown["state_digest"])
    assert shown["metadata"]["tokens_seen"] > 0
    assert shown["config"]["lora_rank"] == 4
    for tensor in shown["tensors"]:
        assert list(tensor) == ["name", "dtype", "shape", "digest"]
        assert HEX.fullmatch(tensor["digest"])
    names = {tensor["name"].partition(".")[0] for tensor in shown["tensors"]}
    assert names == {"model", "optimizer", "rng", "history"}
    for target in (finished_run / "checkpoints", path):
        assert json.loads(distrust("show", target, "--json").out) == shown
    for_people = distrust("show", finished_run, "--tensors").out
    assert shown["state_digest"] in for_people
    assert all(tensor["name"] in for_people for tensor in shown["tensors"])


def test_show_of_a_step(distrust, finished_run):
    assert json.loads(distrust("show", finished_run, "--step", 4, "--json").out)["step"] == 4
    output = distrust("show", finished_run, "--step", 5)
    assert (output.code, output.err) == (
        1,
        f"distrust: {finished_run}: no checkpoint of step 5; there are 2, 4, 6\n",
    )


def test_verify(distrust, finished_run, copy):
    output = distrust("verify", finished_run)
    assert output.code == 0
    assert output.out.count(": ok\n") == 3
    path = copy / "checkpoints" / "checkpoint-4.safetensors"
    damage(path)
    output = distrust("verify", copy)
    assert output.code == 1
    assert output.out.count(": ok\n") == 2
    assert f"{path}: DAMAGED: tensor " in output.out
    rows = json.loads(distrust("verify", copy, "--json").out)
    assert [row["ok"] for row in rows] == [True, False, True]
    assert [row["verdict"] for row in rows] == ["ok", "DAMAGED", "ok"]
    assert [list(row) for row in rows] == [["path", "ok", "verdict", "reason"]] * 3
    assert "is damaged (bytes" in rows[1]["reason"]
    assert distrust("verify", path).code == 1
    assert distrust("verify", finished_run, path).code == 1
    assert distrust("verify", finished_run, copy / "checkpoints" / "checkpoint-2.safetensors").code == 0


@pytest.mark.parametrize("name", ["model.safetensors", "data.jsonl"])
def test_a_file_of_another_program_is_not_damaged(distrust, tmp_path, name):
    path = tmp_path / name
    header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    content = len(header).to_bytes(8, "little") + header + b"x"
    path.write_bytes(b'{"text": "ore"}\n' * 99 if name.endswith(".jsonl") else content)
    output = distrust("verify", path)
    message = "neither its name nor its first bytes are those of a checkpoint"
    assert (output.code, output.out) == (1, f"{path}: NOT A CHECKPOINT: {message}\n")
    (row,) = json.loads(distrust("verify", path, "--json").out)
    assert row == {"path": str(path), "ok": False, "verdict": "NOT A CHECKPOINT", "reason": message}
    named = path.rename(tmp_path / "checkpoint-7.safetensors")
    assert f"{named}: DAMAGED: " in distrust("verify", named).out


def test_a_damaged_checkpoint_under_another_name_is_damaged(distrust, finished_run, tmp_path):
    path = tmp_path / "backup.safetensors"
    for offset in (100, 5000, -1):
        raw = bytearray((finished_run / "checkpoints" / "checkpoint-4.safetensors").read_bytes())
        raw[offset] ^= 1
        path.write_bytes(raw)
        assert f"{path}: DAMAGED: " in distrust("verify", path).out


@pytest.mark.parametrize("verb", ["show", "ls"])
def test_a_file_that_is_not_a_checkpoint(distrust, tmp_path, verb):
    path = tmp_path / "notes.txt"
    path.write_text("buy milk and a whole lot of other things\n" * 9)
    output = distrust(verb, path)
    assert (output.code, output.out) == (1, "")
    assert output.err.startswith(f"distrust: {path}: ")
    assert output.err.count("\n") == 1
    assert distrust("verify", path).code == 1


@pytest.mark.parametrize("verb", ["ls", "show", "verify"])
def test_an_inaccessible_target_is_not_reported_as_missing(distrust, tmp_path, monkeypatch, verb):
    path = str(tmp_path / "there")
    real = os.stat

    def stat(asked, *arguments, **options):
        if asked == path or str(asked) == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(asked, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    output = distrust(verb, path)
    assert (output.code, output.out) == (1, "")
    assert output.err == f"distrust: {path}: cannot be read: Permission denied\n"


@pytest.mark.parametrize(("name", "named"), [("a file", "a file: "), (b"a file", "a file: "), (None, "")])
def test_a_system_error_names_its_file(distrust, monkeypatch, name, named):
    def main(arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)

    monkeypatch.setattr("distrust.cli.ls.main", main)
    output = distrust("ls", "x")
    assert (output.code, output.out, output.err) == (1, "", f"distrust: ls: {named}Permission denied\n")


def test_a_missing_library_is_named_with_the_command_that_installs_it(distrust, monkeypatch):
    def main(arguments):
        raise ModuleNotFoundError("No module named 'rich'", name="rich")

    monkeypatch.setattr("distrust.cli.ls.main", main)
    output = distrust("ls", "x")
    assert (output.code, output.out, output.err.count("\n")) == (1, "", 1)
    assert output.err.startswith("distrust: distrust ls needs rich, which is not installed: pip install '")


def test_diff(distrust, finished_run, copy):
    same = distrust("diff", finished_run, copy / "checkpoints" / "checkpoint-6-final.safetensors")
    assert same.code == 0
    assert same.out.endswith(
        "equal: the recorded digests are the same, bit for bit (verify reads the data)\n"
    )
    shown = json.loads(distrust("diff", finished_run, copy, "--json").out)
    assert (shown["equal"], shown["differences"]) == (True, [])

    older = finished_run / "checkpoints" / "checkpoint-4.safetensors"
    output = distrust("diff", finished_run, older)
    assert output.code == 1
    assert "state step: 6 -> 4\n" in output.out
    shown = json.loads(distrust("diff", finished_run, older, "--json").out)
    assert set(shown) == {"equal", "a", "b", "differences"}
    assert shown["equal"] is False
    assert (shown["a"]["step"], shown["b"]["step"]) == (6, 4)
    names = {(row["kind"], row["name"]) for row in shown["differences"]}
    assert ("state", "step") in names
    assert ("state", "metadata.tokens_seen") in names
    assert ("tensor", "history.loss") in names
    assert any(purpose == "tensor" and "lora_A" in name for purpose, name in names)
    assert not any("config" in name for _, name in names)


def test_diff_of_checkpoints_of_two_engines(distrust, tmp_path):
    for engine, names in (("torch", "abc"), ("mlx", "cdefg")):
        run = {"environment": {"engine": engine}}
        model = {name: np.full(3, ord(name)) for name in names}
        with CheckpointManager(tmp_path / engine) as manager:
            manager.save(Checkpoint(step=1, model=model, run=run))
    output = distrust("diff", tmp_path / "torch", tmp_path / "mlx")
    assert output.code == 1
    lines = output.out.splitlines()
    assert lines[2].startswith("a was made with torch, b with mlx: they use different tensor names")
    assert lines[-1] == "different: 0 scalars, 6 of 7 tensors"
    alone = distrust("diff", tmp_path / "torch", tmp_path / "torch")
    assert (alone.code, "was made with" in alone.out) == (0, False)


def test_diff_reads_headers_only(distrust, copy, finished_run):
    damage(copy / "checkpoints" / "checkpoint-6-final.safetensors")
    assert distrust("diff", copy, finished_run).code == 0


def test_the_commands_on_files_are_light(finished_run):
    code = """
import sys
from distrust.cli import main
for arguments in (["ls", RUN], ["show", RUN], ["show", RUN, "--json"], ["diff", RUN, RUN], ["verify", RUN],
                  ["prune", RUN, "--damaged", "--keep-last", "9"]):
    assert main(arguments) == 0
heavy = {"numpy", "torch", "tyro", "asyncio", "rich", "transformers", "distrust.config"} & set(sys.modules)
assert not heavy, heavy
""".replace("RUN", repr(str(finished_run)))
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (completed.returncode, completed.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["show", "--json"], ["ls"]])
def test_a_reader_that_exits_early(start, finished_run, arguments):
    """As ``distrust show RUN --json | head -1``: no traceback, and no remark at the interpreter's end."""
    process = start(*arguments, finished_run)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, "")
