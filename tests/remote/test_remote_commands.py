"""The commands on a URL say of a run what they say of its folder."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("obstore", reason="needs the extra [remote]")

from distrust import Checkpoint, CheckpointManager, ConfigError
from distrust.checkpoint import catalog
from distrust.checkpoint.remote import fetch, pruner, remote_run
from distrust.checkpoint.remote.client import connect
from distrust.checkpoint.remote.line import object_name
from distrust.checkpoint.remote.location import parse
from distrust.checkpoint.remote.mirror import Mirror
from distrust.checkpoint.remote.remote_run import RemoteRun
from distrust.cli import copy, main
from distrust.remote_copies import fetch_checkpoint
from tests.remote.fake_store import FakeStore

FINAL = "checkpoint-3-final.safetensors"


class Output(NamedTuple):
    code: int
    out: str
    err: str


def distrust(*arguments: object) -> Output:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Output(code, out.getvalue(), err.getvalue())


def upload(folder: Path, url: str) -> None:
    """What `aws s3 cp --recursive` does."""
    client = connect(parse(url, "url"))
    for path in folder.rglob("*.*"):
        if path.is_file() and not path.name.startswith("."):
            client.put(str(path.relative_to(folder)), path.read_bytes())


@pytest.fixture
def folder(tmp_path):
    """A run of the steps 1, 2 and 3, the last one final."""
    with CheckpointManager(tmp_path / "run" / "checkpoints", keep_last=None) as manager:
        for step in (1, 2, 3):
            state = {"w": np.full(5000, step), "b": np.zeros(3)}
            metrics = {"eval_loss": 1 / step}
            manager.save(Checkpoint(step=step, model=state, metrics=metrics), final=step == 3)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    return tmp_path / "run"


@pytest.fixture
def same(folder, s3) -> Callable[..., Output]:
    """Runs a command on the folder and on its copy in a store, and compares all that both print."""

    def same(verb: str, *arguments: str) -> Output:
        outputs = []
        for root in (str(folder), s3.url):
            output = distrust(verb, *(argument.replace("RUN", root) for argument in arguments))
            outputs.append(Output(*(sizes.sub("0", str(part).replace(root, "RUN")) for part in output)))
        assert outputs[0] == outputs[1]
        return outputs[1]

    # A file needs whole blocks of a disk, an object does not.
    sizes = re.compile(r'[0-9.]+ [KM]?i?B\b|(?<="bytes": )[0-9]+|(?<="bytes_freed": )[0-9]+')
    upload(folder, s3.url)
    return same


def test_reading_commands_print_the_same_for_a_url(same):
    assert same("ls", "RUN").out.count("\n") == 4
    assert (
        json.loads(same("ls", "RUN", "--json").out)[0]["path"] == "RUN/checkpoints/checkpoint-1.safetensors"
    )
    same("ls", "RUN/checkpoints")
    same("ls", "RUN/checkpoints/checkpoint-2.safetensors")
    same("show", "RUN")
    same("show", "RUN", "--step", "2", "--tensors")
    same("show", "RUN", "--step", "9")
    same("show", "RUN/checkpoints/checkpoint-2.safetensors", "--step", "2")
    same("show", "RUN/checkpoints/checkpoint-2.safetensors", "--json")
    assert same("diff", "RUN", "RUN").code == "0"
    assert same("diff", "RUN/checkpoints/checkpoint-2.safetensors", "RUN", "--json").code == "1"
    assert same("verify", "RUN").out.count(": ok\n") == 3


def test_damage_is_printed_the_same_for_a_url(same, folder, s3):
    path = folder / "checkpoints" / "checkpoint-3-final.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    path = folder / "checkpoints" / "checkpoint-2.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    upload(folder, s3.url)
    assert "DAMAGED: tensor model.w is damaged" in same("verify", "RUN").out
    assert "checkpoint-2.safetensors: damaged" in same("ls", "RUN").err
    for verb in ("ls", "show", "verify"):
        assert same(verb, "RUN/checkpoints/checkpoint-2.safetensors").code == "1"


def test_a_prefix_of_several_runs_lists_them(folder, s3):
    for name in ("b", "a"):
        upload(folder, f"{s3.url}/{name}")
    assert [line.split()[:2] for line in distrust("ls", s3.url).out.splitlines()] == [
        ["run", "step"], ["a", "3"], ["b", "3"],
    ]  # fmt: skip
    rows = json.loads(distrust("ls", s3.url, "--json").out)
    assert [row["run"] for row in rows] == [f"{s3.url}/a", f"{s3.url}/b"]


def test_what_cannot_be_read_is_one_line(s3, monkeypatch):
    empty = distrust("ls", s3.url)
    assert (empty.code, empty.out) == (0, f"no checkpoints in {s3.url}\n")
    for verb, text in (("show", "no checkpoints here"), ("verify", "no checkpoints here")):
        output = distrust(verb, s3.url)
        assert (output.code, output.err) == (1, f"distrust: {s3.url}: {text}\n")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    output = distrust("ls", s3.url)
    assert (output.code, output.err.count("\n")) == (1, 1)
    assert "the secret key is wrong" in output.err


def test_prune_removes_the_same_from_a_url(same, s3):
    rules = ("--keep-last", "1", "--keep-best", "1")
    wrong = ("--keep-best", "1", "--metric", "no")
    for arguments in ((), ("--keep-last", "0"), wrong, (*rules, "--dry-run")):
        same("prune", "RUN", *arguments)
    same("prune", "RUN/checkpoints/checkpoint-2.safetensors", *rules)
    dry = connect(parse(s3.url, "url")).list()
    assert not any("/terms/" in info.key for info in dry), "a dry run needs no term"
    assert "checkpoint-1.safetensors" in same("prune", "RUN", *rules, "--json").out
    same("ls", "RUN")
    assert "nothing to remove" in same("prune", "RUN", *rules).out


def test_prune_leaves_what_it_may_not_remove(folder, s3):
    (folder / "checkpoints" / "checkpoint-9.safetensors").write_bytes(b"of another program")
    path = folder / "checkpoints" / "checkpoint-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    upload(folder, s3.url)
    client = connect(parse(s3.url, "url"))
    for key in (
        "x.safetensors",
        "checkpoints/deeper/checkpoint-1.safetensors",
        "checkpoints/checkpoint-1.bin",
    ):
        client.put(key, path.read_bytes())
    keys = {info.key for info in client.list()}
    output = distrust("prune", s3.url, "--keep-last", "1")
    assert (output.code, output.err.count("checkpoint-1.safetensors: tensor model.w is damaged")) == (0, 1)
    removed = keys - {info.key for info in client.list()}
    assert removed == {"checkpoints/checkpoint-2.safetensors"}
    output = distrust("prune", s3.url, "--damaged")
    assert (output.code, output.err.count("\n")) == (2, 1)
    assert "delete what `distrust verify` names" in output.err


@pytest.mark.parametrize("ends", [True, False])
def test_a_term_displaces_nothing_that_the_last_writer_still_adds(folder, monkeypatch, ends):
    """It ends, or adds its last checkpoint, after a command has listed what is there."""
    store, url = FakeStore(), "s3://bucket/run"
    for module in (copy, pruner, remote_run):
        monkeypatch.setattr(module, "connect", store.connect)
    monkeypatch.setattr(pruner, "PATIENCE_SECONDS", 0.3)
    client = store.connect(parse(f"{url}/checkpoints", "url"))
    assert (
        distrust("copy", folder / "checkpoints" / "checkpoint-1.safetensors", f"{url}/checkpoints").code == 0
    )
    client.delete("terms/00000001.end")  # so it still writes

    def add_the_final(action: str, key: str) -> None:
        if key.endswith("terms/probe"):
            store.before = lambda *_: None
            path = folder / "checkpoints" / FINAL
            client.put(object_name(3, "final", 1, catalog.verify(path).state_digest), path.read_bytes())
            if ends:
                client.put("terms/00000001.end", b"1")

    store.before = add_the_final
    assert distrust("copy", folder / "checkpoints" / "checkpoint-2.safetensors", url).code == 0
    assert [file.step for file in RemoteRun(parse(url, "url")).files()] == [1, 2, 3]
    monkeypatch.setattr(pruner, "PATIENCE_SECONDS", 600)
    client.delete("terms/00000002.end")  # that command was killed
    client.delete(object_name(3, "final", 1, catalog.verify(folder / "checkpoints" / FINAL).state_digest))
    assert distrust("copy", folder / "checkpoints" / FINAL, url, "--take-over").code == 0


@pytest.mark.parametrize("store", ["s3", "azure"])
def test_a_run_is_copied_to_a_store_and_back(folder, tmp_path, store, request):
    url = f"{request.getfixturevalue(store).url}/ü b%20c"
    first = distrust("copy", folder, url)
    assert (first.code, first.err, first.out.count(": copied")) == (0, "", 4)
    assert first.out.index("checkpoint-3-final.1-") < first.out.index("checkpoint-2.1-")
    second = distrust("copy", folder, url)
    assert (second.code, second.out.count(": already there"), second.out.count(": copied")) == (0, 3, 0)
    assert distrust("diff", folder, url).code == 0
    assert distrust("copy", url, f"{url}-copy").code == 0
    back = distrust("copy", f"{url}-copy", tmp_path / "back")
    assert (back.code, back.err) == (0, "")
    (tmp_path / "back" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert distrust("copy", url, tmp_path / "back").err == "", "what has grown since is no conflict"
    (tmp_path / "back" / "metrics.jsonl").write_text('{"step": 1}\n')
    for path in folder.rglob("*.*"):
        if path.is_file() and not path.name.startswith("."):
            assert (tmp_path / "back" / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_processes_that_need_one_checkpoint_download_it_once(folder, tmp_path, monkeypatch):
    store, location = FakeStore(), parse("s3://bucket/run", "url")
    monkeypatch.setattr(remote_run, "connect", store.connect)
    monkeypatch.setattr(fetch, "RANGE_BYTES", 1 << 12)
    monkeypatch.setenv("DISTRUST_CACHE", str(tmp_path / "cache"))
    path = folder / "checkpoints" / FINAL
    store.connect(location).put(f"checkpoints/{FINAL}", path.read_bytes())
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(fetch_checkpoint, [location] * 4))
    assert {copy.read_bytes() for copy, _ in copies} == {path.read_bytes()}
    requests = [action for action, key in store.requests]
    assert requests.count("read") == 4 + path.stat().st_size // (1 << 12), "four headers and one file"


def test_one_checkpoint_is_copied_into_a_folder(folder, s3, tmp_path):
    upload(folder, s3.url)
    assert distrust("copy", f"{s3.url}/checkpoints/checkpoint-2.safetensors", tmp_path / "a").code == 0
    assert [path.name for path in (tmp_path / "a").glob("*.safetensors")] == ["checkpoint-2.safetensors"]
    assert distrust("copy", tmp_path / "a" / "checkpoint-2.safetensors", f"{s3.url}-b").code == 0
    assert distrust("diff", tmp_path / "a", f"{s3.url}-b").code == 0


def test_a_copy_replaces_nothing_and_leaves_out_what_is_damaged(folder, s3, tmp_path):
    upload(folder, s3.url)
    conflicting = tmp_path / "other" / "checkpoints"
    with CheckpointManager(conflicting) as manager:
        manager.save(Checkpoint(step=2, model={"w": np.zeros(1)}))
    content = (conflicting / "checkpoint-2.safetensors").read_bytes()
    for a, b in ((conflicting.parent, s3.url), (s3.url, conflicting.parent)):
        output = distrust("copy", a, b)
        assert (output.code, output.err.count("\n")) == (1, 1)
        assert "checkpoint-2.safetensors: holds another state than" in output.err
    assert (conflicting / "checkpoint-2.safetensors").read_bytes() == content

    (folder / "metrics.jsonl").write_text("another run")
    path = folder / "checkpoints" / "checkpoint-2.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    (conflicting / "checkpoint-2.safetensors").unlink()
    output = distrust("copy", folder, s3.url)
    assert output.code == 1
    assert "checkpoint-2.safetensors: not copied: damaged" in output.err
    assert "metrics.jsonl: differs from" in output.err
    assert connect(parse(s3.url, "url")).read("metrics.jsonl", 0, 99) == b'{"step": 1}\n'


def test_prune_and_copy_are_refused_while_a_run_writes(folder, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(pruner, "PATIENCE_SECONDS", 2)
    mirror = Mirror(f"{s3.url}/checkpoints", patience=1)
    with CheckpointManager(tmp_path / "live", mirror=mirror) as manager:
        manager.save_async(Checkpoint(step=9, model={"w": np.zeros(1)})).wait_mirrored()
        for arguments in (("copy", folder, s3.url), ("prune", s3.url, "--keep-last", "1")):
            output = distrust(*arguments)
            assert output.code == 1
            assert "another writer holds this mirror" in output.err
    assert distrust("copy", folder, s3.url).code == 0, "its term has ended"


def test_a_mirror_in_a_folder_is_read_as_one_in_a_store(tmp_path):
    with CheckpointManager(tmp_path / "local", mirror=tmp_path / "mirror") as manager:
        manager.save(Checkpoint(step=9, model={"w": np.zeros(1)}))
    assert distrust("ls", tmp_path / "mirror").out.splitlines()[1].split()[0] == "9"
    assert distrust("diff", tmp_path / "local", tmp_path / "mirror").code == 0
    assert distrust("verify", tmp_path / "mirror").out.endswith(": ok\n")
    assert distrust("copy", tmp_path / "mirror", tmp_path / "back").code == 0
    assert distrust("diff", tmp_path / "local", tmp_path / "back").code == 0
    with pytest.raises(ConfigError, match="is a mirror, or a copy of one; `distrust copy` makes a run"):
        CheckpointManager(tmp_path / "mirror").acquire()  # its names are not those of a run


def test_what_copy_cannot_do_is_said(folder, s3):
    for arguments, text in (
        ((folder, folder.parent / "x"), "neither A nor B is a URL"),
        ((folder, f"{s3.url}/x.safetensors"), "names a file"),
        ((f"{s3.url}/empty", folder), "no checkpoints here"),
        ((folder.parent / "nothing", s3.url), "no such file"),
        ((s3.url, folder, "--take-over"), "--take-over goes with a URL"),
    ):
        output = distrust("copy", *arguments)
        assert output.code in (1, 2)
        assert text in output.err
        assert output.err.count("\n") == 1


def test_without_obstore_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "obstore", None)
    output = distrust("ls", "s3://bucket/run")
    assert output.code == 1
    assert "s3://bucket/run needs obstore" in output.err
    assert "[remote]" in output.err
