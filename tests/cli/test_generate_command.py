"""``distrust generate``: which checkpoint is asked, and how."""

from __future__ import annotations

import json
import shutil

import pytest

from distrust.testing.models import train_arguments, write_records

SHORT = ["--max-new-tokens", 12, "--json", "--prompt", "ore"]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def moved(folder, tmp_path_factory):
    """A run whose checkpoints write different things, its best not its newest; and a model that chats."""
    from distrust.cli import main

    place = tmp_path_factory.mktemp("generate")
    shutil.copytree(folder / "model", place / "model")
    said = json.loads((place / "model" / "tokenizer_config.json").read_text())
    (place / "model" / "tokenizer_config.json").write_text(json.dumps({**said, "chat_template": TEMPLATE}))
    write_records(place / "data.jsonl")
    more = ["--learning-rate", 0.05, "--warmup-steps", 0, "--metric", "loss", "--metric-mode", "max"]
    assert main(train_arguments(place, place / "run", *more)) == 0
    return place / "run"


def text(given):
    assert given.code == 0, given.err
    (row,) = json.loads(given.out)
    return row["checkpoint"]


def test_a_checkpoint_by_its_name_by_its_step_and_the_best(distrust, moved):
    files = {row["step"]: row for row in json.loads(distrust("ls", moved, "--json").out)}
    by_step = {step: text(distrust("generate", moved, "--step", step, *SHORT)) for step in files}
    assert len(set(by_step.values())) > 1
    for step, row in files.items():
        assert text(distrust("generate", "--checkpoint", row["path"], *SHORT)) == by_step[step]
        assert text(distrust("generate", row["path"], *SHORT)) == by_step[step]
    assert text(distrust("generate", "--checkpoint", moved, *SHORT)) == by_step[6]
    best = max(files, key=lambda step: files[step]["metrics"]["loss"])
    assert text(distrust("generate", moved, "--best", *SHORT)) == by_step[best]
    given = distrust("generate", files[2]["path"], "--step", 2, *SHORT)
    assert (given.code, given.err.count("\n")) == (2, 1)
    assert "--step 2 goes with a run or a directory" in given.err


def test_it_falls_back_from_a_damaged_one(distrust, moved, tmp_path):
    copy = shutil.copytree(moved, tmp_path / "run")
    newest = copy / "checkpoints" / "checkpoint-6-final.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[-1] ^= 1
    newest.write_bytes(raw)
    given = distrust("generate", copy, *SHORT)
    assert given.err.startswith(f"distrust: warning: skipped a damaged checkpoint: {newest}: tensor ")
    assert given.err.count("\n") == 1
    assert text(given) == text(distrust("generate", moved, "--step", 4, *SHORT))
    named = distrust("generate", newest, *SHORT)
    assert (named.code, named.out, named.err.count("\n")) == (1, "", 1)


def test_chat_applies_the_template(distrust, moved, finished):
    chat = text(distrust("generate", moved, "--chat", *SHORT))
    spelled = "<user>ore<assistant>"
    plain = distrust("generate", moved, "--max-new-tokens", 12, "--json", "--prompt", spelled)
    assert chat == text(plain)
    given = distrust("generate", finished, "--chat", *SHORT)
    assert (given.code, given.out) == (1, "")
    assert given.err.startswith("distrust: --chat: the model's tokenizer has no chat template; ")
    assert given.err.count("\n") == 1


def test_a_template_that_refuses(distrust, moved, tmp_path):
    model = shutil.copytree(moved.parent / "model", tmp_path / "model")
    said = json.loads((model / "tokenizer_config.json").read_text())
    refusing = {**said, "chat_template": "{{ raise_exception('no system here') }}"}
    (model / "tokenizer_config.json").write_text(json.dumps(refusing))
    given = distrust("generate", moved, "--model", model, "--chat", *SHORT)
    assert (given.code, given.err.count("\n")) == (1, 1)
    assert "--chat: the model's chat template refuses the prompt: no system here" in given.err


def test_the_likeliest_tokens_only(distrust, moved):
    drawn = [*SHORT, "--temperature", 1.5, "--seed", 3]
    alone = text(distrust("generate", moved, *drawn, "--top-p", "1e-9"))
    assert alone == text(distrust("generate", moved, *SHORT))
    assert alone != text(distrust("generate", moved, *drawn))
    for wrong in (
        ["--top-p", 0.5],
        ["--top-p", 0, "--temperature", 1],
        ["--top-p", "nan", "--temperature", 1],
    ):
        given = distrust("generate", moved, *SHORT, *wrong)
        assert (given.code, given.err.count("\n")) == (2, 1)
        assert given.err.startswith("distrust: --top-p ")
