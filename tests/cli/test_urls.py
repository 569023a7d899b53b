"""A URL is never taken for a path: every argument of every command understands it, or refuses it."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from distrust import ConfigError, DistrustTrainer, TrainConfig, load_file, preview, save_file, verify_file
from distrust.checkpoint import Checkpoint, CheckpointManager
from distrust.cli import COMMANDS
from distrust.config import flag
from distrust.errors import RemoteError
from distrust.export import export

URL = "s3://bucket/x"
#: Arguments of text that name neither a file nor a folder. Any other one is tested.
TEXTS = {
    "best_by", "metric", "prompt", "rendezvous", "revision", "split", "eval_split", "subset", "title",
    "device", "date", "layers", "target_modules", "exclude_modules", "save_every", "on_preemption",
    "nproc", "nnodes", "panels", "smooth",
}  # fmt: skip
#: What each command needs besides the argument that is tested.
REQUIRED = {
    "export": ["--to", "new"],
    "convert": ["--to", "new"],
    "generate": ["--prompt", "ore"],
    "prune": ["--keep-last", "9"],
}


class _ParserError(Exception):
    """Carries the parser of a command."""


def arguments_of(verb: str) -> Iterator[argparse.Action]:
    """The arguments of a command that may be paths."""

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise _ParserError(parser)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, stop)
        with pytest.raises(_ParserError) as caught:
            import_module(f"distrust.cli.{verb}").main([])
    for action in caught.value.args[0]._actions:
        text = action.dest not in TEXTS and not action.dest.endswith("_column")
        if action.nargs != 0 and action.type not in (int, float) and action.choices is None and text:
            yield action


def command_lines(run: Path) -> Iterator[list[str]]:
    """Each command with a URL in the place of each path."""
    for verb in COMMANDS.keys() - {"train"}:
        actions = list(arguments_of(verb))
        required = [a for a in actions if not a.option_strings and (a.required or a.dest == "data")]
        for tested in actions:
            words = [verb, *(URL if each is tested else str(run) for each in required)]
            if tested not in required:
                words += [*tested.option_strings[:1], URL]
            options = REQUIRED.get(verb, [])
            yield words + ([] if options[:1] == tested.option_strings else options)
    hints = get_type_hints(TrainConfig)
    for name, hint in hints.items():
        if "str" in str(hint) and name not in TEXTS and not name.endswith("_column"):
            new = [] if name == "out" else ["--out", str(run) if name == "branch" else "new"]
            step = ["--from-step", "2"] if name == "branch" else []
            yield ["train", *new, *step, "--max-steps", "1", flag(name), URL]
    yield from (["train", "--config", URL], ["train", "--resume", URL])


def test_no_command_takes_a_url_for_a_path(
    distrust: Callable[..., Any], finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "DISTRUST_INSTANCE")):
            monkeypatch.delenv(name)
    for name in ("HOME", "DISTRUST_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    lines = list(command_lines(finished_run))
    assert len(lines) > 40
    for line in lines:
        result = distrust(*line)
        # Without credentials, a URL that is understood fails before anything is asked or created.
        understood = result.code == 1 and "no credentials were found" in result.err
        errors = [text for text in result.err.splitlines() if not text.startswith("distrust: warning")]
        assert understood or result.code == 2, (line, result)
        assert len(errors) == 1, (line, result)
        assert URL in errors[0], (line, result)
        created = {path.name for path in Path().iterdir()}
        assert created <= ({"new"} if "--mirror" in line else set()), line  # the run's folder
        shutil.rmtree("new", ignore_errors=True)


def test_no_function_takes_a_url_for_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    checkpoint = Checkpoint(step=1, model={})
    calls: list[Callable[[], Any]] = [
        lambda: CheckpointManager(URL),
        lambda: CheckpointManager("runs").load(Path(URL)),
        lambda: DistrustTrainer(TrainConfig(out=str(Path(URL)))),
        lambda: export("runs", URL),
        lambda: load_file(URL),
        lambda: preview(URL),
        lambda: save_file(Path(URL), checkpoint),
        lambda: verify_file(URL),
    ]
    for call in calls:
        with pytest.raises((ConfigError, RemoteError), match="s3:/"):
            call()
        assert not (tmp_path / "s3:").exists()
    monkeypatch.setenv("DISTRUST_CACHE", URL)
    with pytest.raises(ConfigError, match=r"\$DISTRUST_CACHE"):
        _ = TrainConfig(out=URL).run_directory
