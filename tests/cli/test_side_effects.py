"""What commands do besides their work: they write nothing outside of their targets and the cache, contact no
network and start no program.

Audit hooks show what Python does; what native code writes shows in the folders afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from campaigns.child import python_environment
from campaigns.fuzz.snapshots import snapshot

pytest.importorskip("peft")

#: Runs command lines and prints, as JSON, what each did that is no read, and what exists afterwards.
CHILD = """
import contextlib, io, json, os, sys
from pathlib import Path
from campaigns.fuzz.accesses import Recorder

recorder = Recorder()  # before anything is imported
from distrust.cli import main

report = []
for line in sys.argv[1:]:
    with recorder.record() as accesses, contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(line.split())
        except SystemExit as error:  # --help
            code = error.code
    report.append((code, [access for access in accesses if access.kind != "reads"]))
print(json.dumps(report))
"""
TRAIN = "train --model model --data records.jsonl --cache-dir cache --threads 1 --lora-rank 2 --batch-size 2"
#: Command line -> the paths that it may write, relative to the current folder.
COMMANDS = {
    f"{TRAIN} --max-steps 2 --save-every 1 --out run": ("run", "cache"),
    f"{TRAIN} --max-steps 3 --out run": ("run", "cache"),
    "eval run --data records.jsonl --cache-dir cache": ("cache",),
    "generate run --prompt salt --max-new-tokens 2": (),
    "export run --to out/adapter": ("out",),
    "export run --to out/merged --format merged": ("out",),
    "convert out/adapter --to imported": ("imported",),
    "preview records.jsonl --model model --html page.html": ("page.html",),
    "weigh records.jsonl --out weighed.jsonl": ("weighed.jsonl",),
    "ls run": (),
    "show run --tensors": (),
    "verify run": (),
    "diff run run": (),
    "report run": ("run/report.html",),
    "plot run --panels loss --out plot.svg": ("plot.svg",),
    "prune run --keep-last 1": ("run/checkpoints",),
    "rescue": (),
    "demo --help": (),
}
#: What libraries write besides: docs/security.md names them. Names are relative to the parent folder.
LIBRARIES = ("home/.cache/matplotlib", "home/.config/matplotlib", "temporary")
PROGRAMS = ("fc-list",)  # matplotlib looks for fonts, once for each user


def is_below(path: Path, folders: list[Path]) -> bool:
    """Whether it is one of the folders, or in one, or the hidden name under which one is written."""
    name = path.name.removeprefix(".").removesuffix(".tmp").rpartition(".")[0]
    written = path.with_name(name) if path.name.endswith(".tmp") else path
    return any(folder in (written, *path.parents) for folder in folders)


def test_commands_write_their_targets_and_contact_nobody(run_python, tiny_model, data, tmp_path, monkeypatch):
    work = tmp_path / "work"
    for name in ("home", "temporary", "work"):
        (tmp_path / name).mkdir()
    shutil.copytree(tiny_model, work / "model")
    shutil.copyfile(data, work / "records.jsonl")
    monkeypatch.chdir(work)
    for name in [
        name for name in os.environ if name.startswith(("XDG_", "HF_", "MPL", "DISTRUST_", "TORCH"))
    ]:
        monkeypatch.delenv(name)
    original = snapshot(work)
    environment = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")}
    environment |= {"DISTRUST_SHM": ""}  # a step in shared memory is not below the current folder
    environment |= {"PYTHONPATH": python_environment()["PYTHONPATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    result = run_python(CHILD, *COMMANDS, seconds=300, **environment)
    report = json.loads(result.stdout)

    libraries = [tmp_path / name for name in LIBRARIES]
    for (line, targets), (code, accesses) in zip(COMMANDS.items(), report, strict=True):
        assert code == 0, (line, result.stderr)
        allowed = [*(work / target for target in targets), *libraries, Path(os.devnull)]
        parents = {str(parent) for folder in allowed for parent in folder.parents}  # made if they are missing
        writes = [(event, path) for kind, event, path in accesses if kind == "writes"]
        writes = [write for write in writes if write[0] != "os.mkdir" or write[1] not in parents]
        assert [write for write in writes if not is_below(Path(write[1]), allowed)] == [], line
        actions = [action for kind, _, action in accesses if kind != "writes"]
        assert [action for action in actions if not any(name in action for name in PROGRAMS)] == [], line

    present = snapshot(work)
    changed = {path for path in original if path != str(work) and original[path] != present[path]}
    assert changed == set()
    new = {Path(path).relative_to(work).parts[0] for path in present.keys() - original.keys()}
    assert new == {target.split("/")[0] for targets in COMMANDS.values() for target in targets}
    assert {path.name for path in (tmp_path / "home").glob("*/*")} <= {"matplotlib"}
