"""Commands that need files give for a URL what they give for the folder that was copied there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distrust import Checkpoint, CheckpointManager, DistrustError, remote_copies
from distrust.checkpoint.remote.client import connect
from distrust.checkpoint.remote.location import parse
from distrust.cli import main
from distrust.export import export
from distrust.testing.models import make_model, write_records
from tests.remote.conftest import Remote

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of the steps 2 and 4, of which 2 is the best."""
    folder = tmp_path_factory.mktemp("run")
    make_model(folder / "model")
    write_records(folder / "records.jsonl")
    options = {"max_steps": 4, "save_every": 2, "eval_fraction": 0.2, "eval_every": 2, "metric_mode": "max"}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    data = [f"--model={folder / 'model'}", f"--data={folder / 'records.jsonl'}", "--threads=1"]
    assert main(["train", *data, *arguments, f"--out={folder / 'run'}", "--learning-rate=0.02"]) == 0
    return folder / "run"


@pytest.fixture
def url(run: Path, s3: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of the run in a store; the working directory and the cache are empty."""
    client = connect(parse(s3.url, ""))
    for path in run.rglob("[!.]*"):
        if path.is_file():
            client.put(str(path.relative_to(run)), path.read_bytes())
    monkeypatch.setenv("DISTRUST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return s3.url


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command that prints JSON; returns the value without paths."""

    def output(*arguments: str) -> Any:
        capsys.readouterr()
        assert main([*arguments, "--json"]) == 0
        value = json.loads(capsys.readouterr().out)
        return {**value, "path": None} if isinstance(value, dict) else value

    return output


def test_commands_read_a_url_as_the_folder(run: Path, url: str, output: Callable[..., Any]) -> None:
    assert output("eval", url, "--best") == output("eval", str(run), "--best")
    prompt = ["--prompt", "ore", "--max-new-tokens", "4"]
    assert output("generate", url, *prompt) == output("generate", str(run), *prompt)
    one = f"{url}/checkpoints/checkpoint-2.safetensors"
    for source, step in ((url, 4), (one, 2)):
        copied = export(source, f"{step}/x.safetensors", format="state")
        expected = export(run, f"{step}/local/x.safetensors", format="state", step=step)
        assert copied.state_digest == expected.state_digest
        assert str(copied.checkpoint).startswith(url), "not the copy in the cache"
    assert main(["convert", url, "--to", "trainer", "--format", "trainer", "--step", "2"]) == 0
    assert main(["report", url]) == main(["plot", url, str(run), "--panels", "loss"]) == 0
    page = Path("report.html").read_text()
    assert url in page
    assert "step 4" in page
    with pytest.raises(DistrustError, match="there are 2, 4"):
        export(url, "x.safetensors", format="state", step=3)


def test_a_run_begins_with_weights_in_a_store(run: Path, url: str, tmp_path: Path) -> None:
    states = []
    for name in (str(run), url):
        out = tmp_path / f"from-{len(states)}"
        assert main(["train", "--from", name, "--out", str(out), "--max-steps", "1", "--threads", "1"]) == 0
        states.append(CheckpointManager(out / "checkpoints").inspect(1).state_digest)
    assert states[0] == states[1]


def test_a_download_is_used_again_if_it_is_intact(run: Path, url: str, tmp_path: Path) -> None:
    def fetch_step(step: int) -> Path:
        return remote_copies.fetch_checkpoint(parse(url, ""), step=step)[0]

    path = remote_copies.fetch_checkpoint(parse(url, ""), best=True)[0]
    content, inode = path.read_bytes(), path.stat().st_ino
    assert content == (run / "checkpoints/checkpoint-2.safetensors").read_bytes()
    assert fetch_step(2).stat().st_ino == inode
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fetch_step(2).read_bytes() == content
    assert not (tmp_path / "cache/runs").exists()  # where a run with this --out would train


def test_a_branch_begins_with_what_is_in_the_store_now(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = remote_copies.fetch_checkpoint(parse(url, ""), step=2)[0]
    with CheckpointManager(path.parent) as manager:  # an earlier run with that URL ended there
        manager.save(Checkpoint(step=2, model={}), final=True)
    assert main(["train", "--out", url, "--branch", "b", "--from-step", "2", "--max-steps", "3"]) == 1
    assert "--learning-rate was 0.02, is 0.0002" in capsys.readouterr().err, "it is compared with this one"


def test_a_run_in_a_store_is_resumed_with_its_options(url: str) -> None:
    from distrust.engines import config_of_run

    config = config_of_run(url)
    assert (config.out, config.mirror, config.save_every, config.metric_mode) == (url, None, 2, "max")
    with pytest.raises(DistrustError, match=r"has no config\.toml; give --out"):
        config_of_run(f"{url}/none")
