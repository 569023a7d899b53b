"""The hook for foreign formats: the core works without a reader, and asks it only about other files."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from distrust import Checkpoint, CheckpointManager
from distrust.checkpoint import foreign
from distrust.checkpoint.files import parse_checkpoint_name
from distrust.errors import (
    CheckpointError,
    CheckpointNotFound,
    CheckpointUnreadable,
    CorruptCheckpoint,
    SaveFailed,
)


class JsonHeader:
    """A header of the format below."""

    format = "json"
    kind = "periodic"
    digest = state_digest = measured_on = ""
    lacks_arrays = False
    tensors = ()

    def __init__(self, step: int, metrics: dict[str, float], file_size: int) -> None:
        self.step = step
        self.metrics = metrics
        self.file_size = file_size
        self.config = self.metadata = self.saved_metrics = self.sections = self.run_info = {}

    def require_intact(self) -> None:
        pass


class JsonReader:
    """Reads checkpoints that are JSON texts."""

    def detect_format(self, path: Path) -> str | None:
        return "json" if path.is_file() and path.read_bytes()[:1] == b"{" else None

    def read_header(self, path: Path) -> JsonHeader:
        try:
            metrics = json.loads(path.read_bytes())
        except ValueError:
            raise CorruptCheckpoint("not JSON", path=path) from None
        return JsonHeader(parse_checkpoint_name(path).step, metrics, path.stat().st_size)

    verify = read_header

    def read(self, path: Path, *, framework: str = "numpy") -> tuple[JsonHeader, Checkpoint]:
        header = self.read_header(path)
        return header, Checkpoint(step=header.step, model={"format": "json"}, metrics=header.metrics)

    def import_hint(self, folder: Path) -> str:
        return "; import it"

    def convert_hint(self, path: Path) -> str:
        return f"convert {path.name}"


@pytest.fixture
def foreign_file(tmp_path, monkeypatch) -> Path:
    """A foreign checkpoint of step 5, and a reader of its format."""
    monkeypatch.setattr(foreign, "_load_reader", None)
    foreign.register(JsonReader)
    path = tmp_path / "checkpoint-5.safetensors"
    path.write_text('{"loss": 0.5}')
    return path


def test_a_foreign_checkpoint_is_listed_and_loaded_like_one_of_ours(foreign_file):
    manager = CheckpointManager(foreign_file.parent, metric="loss")
    assert manager.list_checkpoints() == [5]
    assert [file.format for file in manager.scan().foreign] == ["json"]
    assert manager.scan().files == manager.scan().damaged == ()
    assert manager.inspect(5).metrics == {"loss": 0.5}
    manager.validate(5)
    for loaded in (manager.load(5), manager.load_latest(), manager.load_best()):
        assert loaded.model == {"format": "json"}


def test_a_foreign_checkpoint_is_never_removed_or_replaced(foreign_file):
    with CheckpointManager(foreign_file.parent, keep_last=1) as manager:
        manager.load_latest()
        for step in (1, 2, 3):
            manager.save(Checkpoint(step=step))
        with pytest.raises(SaveFailed, match="older format"):
            manager.save(Checkpoint(step=5))
        assert manager.list_checkpoints() == [3, 5]
        foreign_file.write_text("{")
        with pytest.warns(UserWarning, match="left: in an older format, and not JSON"):
            assert manager.remove_damaged() == []


def test_the_reader_says_how_to_convert_and_import(foreign_file, tmp_path_factory):
    with pytest.raises(CheckpointError, match=r"in an older format \(json\); convert checkpoint-5"):
        CheckpointManager(foreign_file.parent).choose()
    assert foreign.import_hint(foreign_file.parent) == "; import it"


def test_without_a_reader_a_foreign_file_is_no_checkpoint(foreign_file):
    foreign.register(None)
    manager = CheckpointManager(foreign_file.parent)
    assert manager.list_checkpoints() == []
    assert "not a checkpoint" in manager.scan().damaged[0].reason
    assert foreign.import_hint(foreign_file.parent) == ""
    foreign_file.rename(foreign_file.with_suffix(""))  # without the suffix, only a reader would accept it
    with pytest.raises(CheckpointNotFound):
        manager.load_latest()


def test_files_of_the_core_never_load_the_reader(foreign_file):
    """Listing and loading checkpoints of the core's format must stay cheap."""
    foreign_file.unlink()

    def fail() -> JsonReader:
        pytest.fail("the reader was loaded")

    with CheckpointManager(foreign_file.parent) as manager:
        path = manager.save(Checkpoint(step=1))
        foreign.register(fail)
        assert manager.list_checkpoints() == [1]
        assert manager.load(path).step == manager.load_latest().step == 1
        manager.validate(1)


def test_a_reader_that_cannot_be_loaded_fails_a_save_or_a_load_with_the_reason(foreign_file):
    """Without a free file descriptor Python cannot import it, so nobody knows whether a file is foreign."""

    def fail() -> JsonReader:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    foreign.register(fail)
    with CheckpointManager(foreign_file.parent) as manager:
        for step in (5, 6):
            with pytest.raises(SaveFailed, match="not saved: cannot be read: Too many open files"):
                manager.save(Checkpoint(step=step))
        with pytest.raises(CheckpointUnreadable, match="Too many open files"):
            manager.load(foreign_file)
