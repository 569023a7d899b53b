"""``distrust generate``: the choice of the checkpoint, and sampling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distrust.testing.models import train_arguments, write_records

SHORT = ["--max-new-tokens", 12, "--json", "--prompt", "ore"]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def diverse_run(folder, tmp_path_factory):
    """A run whose checkpoints write different things, its best not its newest; and a model that chats."""
    from distrust.cli import main

    directory = tmp_path_factory.mktemp("generate")
    shutil.copytree(folder / "model", directory / "model")
    config = json.loads((directory / "model" / "tokenizer_config.json").read_text())
    (directory / "model" / "tokenizer_config.json").write_text(
        json.dumps({**config, "chat_template": TEMPLATE})
    )
    write_records(directory / "data.jsonl")
    options = ["--learning-rate", 0.05, "--warmup-steps", 0, "--metric", "loss", "--metric-mode", "max"]
    assert main(train_arguments(directory, directory / "run", *options)) == 0
    return directory / "run"


def text(output):
    assert output.code == 0, output.err
    (row,) = json.loads(output.out)
    return row["checkpoint"]


def test_a_checkpoint_by_its_name_by_its_step_and_the_best(distrust, diverse_run):
    files = {row["step"]: row for row in json.loads(distrust("ls", diverse_run, "--json").out)}
    by_step = {step: text(distrust("generate", diverse_run, "--step", step, *SHORT)) for step in files}
    assert len(set(by_step.values())) > 1
    assert text(distrust("generate", "--checkpoint", files[4]["path"], *SHORT)) == by_step[4]
    assert text(distrust("generate", files[4]["path"], *SHORT)) == by_step[4]
    assert text(distrust("generate", "--checkpoint", diverse_run, *SHORT)) == by_step[6]
    best = max(files, key=lambda step: files[step]["metrics"]["loss"])
    assert text(distrust("generate", diverse_run, "--best", *SHORT)) == by_step[best]
    output = distrust("generate", files[2]["path"], "--step", 2, *SHORT)
    assert (output.code, output.err.count("\n")) == (2, 1)
    assert "--step 2 goes with a run or a directory" in output.err


def test_it_falls_back_from_a_damaged_checkpoint(distrust, diverse_run, tmp_path):
    copy = shutil.copytree(diverse_run, tmp_path / "run")
    newest = copy / "checkpoints" / "checkpoint-6-final.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[-1] ^= 1
    newest.write_bytes(raw)
    output = distrust("generate", copy, *SHORT)
    assert output.err.startswith(f"distrust: warning: skipped a damaged checkpoint: {newest}: tensor ")
    assert output.err.count("\n") == 1
    assert text(output) == text(distrust("generate", diverse_run, "--step", 4, *SHORT))
    named = distrust("generate", newest, *SHORT)
    assert (named.code, named.out, named.err.count("\n")) == (1, "", 1)


def test_chat_applies_the_template(distrust, diverse_run, finished_run):
    chat = text(distrust("generate", diverse_run, "--chat", *SHORT))
    spelled = "<user>ore<assistant>"
    plain = distrust("generate", diverse_run, "--max-new-tokens", 12, "--json", "--prompt", spelled)
    assert chat == text(plain)
    output = distrust("generate", finished_run, "--chat", *SHORT)
    assert (output.code, output.out) == (1, "")
    assert output.err.startswith("distrust: --chat: the model's tokenizer has no chat template; ")
    assert output.err.count("\n") == 1


def test_a_template_that_refuses(distrust, diverse_run, tmp_path):
    model = shutil.copytree(diverse_run.parent / "model", tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    refusing = {**config, "chat_template": "{{ raise_exception('no system here') }}"}
    (model / "tokenizer_config.json").write_text(json.dumps(refusing))
    output = distrust("generate", diverse_run, "--model", model, "--chat", *SHORT)
    assert (output.code, output.err.count("\n")) == (1, 1)
    assert "--chat: the model's chat template refuses the prompt: no system here" in output.err


def test_top_p_samples_from_the_likeliest_tokens(distrust, diverse_run):
    sampling = [*SHORT, "--temperature", 1.5, "--seed", 3]
    alone = text(distrust("generate", diverse_run, *sampling, "--top-p", "1e-9"))
    assert alone == text(distrust("generate", diverse_run, *SHORT))
    assert alone != text(distrust("generate", diverse_run, *sampling))
    for options in (
        ["--top-p", 0.5],
        ["--top-p", 0, "--temperature", 1],
        ["--top-p", "nan", "--temperature", 1],
    ):
        output = distrust("generate", diverse_run, *SHORT, *options)
        assert (output.code, output.err.count("\n")) == (2, 1)
        assert output.err.startswith("distrust: --top-p ")


def test_a_folder_that_was_moved_is_not_looked_up_on_the_hub(distrust, folder, tmp_path, monkeypatch):
    """It may be another model's name there. The hub is used only for a name that the user gives."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "model", "my-model")
    arguments = train_arguments(folder, tmp_path / "run", "--model", "my-model", "--max-steps", 1)
    assert distrust(*arguments).code == 0
    Path("my-model").rename("moved")
    monkeypatch.setattr("distrust.data.hub.announce", None)  # what precedes each access
    for command in (
        ["generate", "run", *SHORT],
        ["eval", "run", "--data", folder / "data.jsonl"],
        *(["export", "run", "--to", "export", "--format", form] for form in ("adapter", "merged")),
    ):
        output = distrust(*command)
        assert (output.code, output.err.count("\n")) == (1, 1), output.err
        assert "was trained on the model ./my-model, which cannot be loaded from here; give its" in output.err
    assert text(distrust("generate", "run", "--model", "moved", *SHORT))
