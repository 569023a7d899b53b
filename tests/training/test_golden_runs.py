"""Runs of an earlier version resume: ``tests/golden`` holds their checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distrust import CheckpointManager, DistrustTrainer, TrainConfig
from distrust.cli import main
from distrust.testing.models import make_model, write_records
from distrust.testing.toy_engine import ToyEngine

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
TEXTS = ["ore melts", "the salt", "salt melts at 9 9 9", "at the ore"]

#: torch and mlx choose kernels by the processor, so only numpy's toy run has the same bits on every machine.
PORTABLE = {"toy"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and the data that the runs were trained on."""
    folder = tmp_path_factory.mktemp("golden")
    write_records(folder / "records.jsonl")
    write_records(folder / "eval.jsonl", 5, seed=9)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    make_model(folder / "model")
    return folder


@pytest.mark.parametrize(
    ("name", "step"), [("toy", 4), ("torch", 4), ("mlx", 4), ("imported", 3), ("imported", 4)]
)
@pytest.mark.filterwarnings("ignore::distrust.DistrustWarning")
def test_run_of_an_earlier_version_resumes(inputs, tmp_path, monkeypatch, name, step):
    if name == "mlx":
        pytest.importorskip("mlx_lm")
    monkeypatch.chdir(inputs)
    file = GOLDEN / name / f"checkpoint-{step}.safetensors"
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    shutil.copy(file, out / "checkpoints")
    manager = CheckpointManager(out / "checkpoints")
    manager.validate(step)
    assert manager.load(step).step == step
    expected = EXPECTED[name]
    engine = {"engine": ToyEngine()} if name == "toy" else {}
    ended = DistrustTrainer(TrainConfig(out=str(out), **expected["options"]), **engine).train()
    assert (ended.step, ended.reason) == (expected["steps"], "finished")
    if name in PORTABLE:
        assert ended.state_digest == expected["final_state_digest"]


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*/*.safetensors")), ids=lambda file: file.parent.name)
def test_commands_read_earlier_versions(file, capsys):
    for verb in ("ls", "show", "verify"):
        assert main([verb, str(file)]) == 0
    assert "DAMAGED" not in capsys.readouterr().out
