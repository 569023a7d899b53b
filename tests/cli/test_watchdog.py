"""Signals end a command at any time, also inside native code without an end; a step is waited for."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from distrust import CheckpointManager
from distrust.cli import watchdog

COMMAND = """
import hashlib, sys
import distrust.engines
from distrust.cli import main, watchdog
from distrust.testing.toy_engine import ToyEngine, ToyTokenizer

kind, data, out = sys.argv[1:]
watchdog.GRACE_SECONDS, watchdog.SLOW_SECONDS, watchdog._POLL_SECONDS = 0.3, 0.1, 0.05

class Tokenizer(ToyTokenizer):
    chat_template = "{% for a in range(4000) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    if kind == "record":  # only one of them
        chat_template = "{% if messages[0].content == 'slow' %}" + chat_template + "{% endif %}"
        chat_template += "{% for m in messages %}{{ m.content }};{% endfor %}"

    def encode(self, text, *, add_special_tokens):
        if kind != "normalizer" or not text:
            return super().encode(text, add_special_tokens=add_special_tokens)
        from tokenizers import Tokenizer, models, normalizers  # as transformers calls it
        core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
        core.normalizer = normalizers.Sequence([normalizers.Replace("a", "aa")] * 25)
        return core.encode_batch([text])[0].ids

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt, **options):
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        return ImmutableSandboxedEnvironment().from_string(self.chat_template).render(messages=conversation)

class Engine(ToyEngine):
    def __init__(self):
        super().__init__()
        self.tokenizer = Tokenizer()

    def micro_step(self, batch, *, tokens):
        if kind.startswith("step"):
            print("in a step", flush=True)
            # Native code, which no signal interrupts: a second, or many.
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 20 if kind == "step" else 1 << 25)
        return super().micro_step(batch, tokens=tokens)

distrust.engines.create_engine = lambda config, **_: Engine()
options = ["--max-steps", "3", "--batch-size", "2", "--cache-dir", f"{out}-cache"]
sys.exit(main(["train", "--data", data, "--out", out, *options]))
"""


@pytest.fixture
def start(tmp_path, start_python, forked_python):
    """Starts a run of the toy, whose model or steps are of some kind."""
    data = tmp_path / "data.jsonl"

    def turns(question: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": "b"}]

    provenance = {"authority_weight": 0.5, "provenance_entropy": 1.0}

    def start(kind: str) -> subprocess.Popen[str]:
        is_chat = kind in ("template", "record")
        contents = [
            {"messages": turns(word)} if is_chat else {"text": "a b a"} for word in ("a", "slow", "b")
        ]
        data.write_text("".join(f"{json.dumps({**provenance, **content})}\n" for content in contents))
        return start_python(COMMAND, kind, data, tmp_path / "run", python=forked_python)

    return start


@pytest.mark.parametrize(
    ("kind", "location", "number"),
    [
        ("template", "the chat template", signal.SIGTERM),  # before any record: its ends are looked for
        ("record", "{0}data.jsonl:2", signal.SIGTERM),
        ("normalizer", "{0}data.jsonl:1 to {0}data.jsonl:3", signal.SIGINT),
    ],
)
def test_a_model_that_does_not_end_names_where_and_ends_by_a_signal(start, tmp_path, kind, location, number):
    process = start(kind)
    location = location.format(f"{tmp_path}/")
    line = process.stderr.readline()
    while line.startswith("distrust: still at ") and f" {location}, for " not in line:
        line = process.stderr.readline()  # the template's probes, or another record, on a busy machine
    assert line.startswith(f"distrust: still at {location}, for ")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert (
        f"distrust: ended by {number.name}, without an answer for 0.3 s, at {location}: nothing is lost"
        in errors.splitlines()
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_step_is_waited_for_and_saved(start, tmp_path):
    process = start("step")
    while process.stdout.readline() != "in a step\n":
        pass
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + signal.SIGTERM, "")
    assert "Stopped by SIGTERM: step 1 is saved" in output
    assert CheckpointManager(tmp_path / "run" / "checkpoints").list_checkpoints() == [1]


def test_a_second_interrupt_does_not_wait_for_a_step(start):
    process = start("step that takes long")
    while process.stdout.readline() != "in a step\n":
        pass
    process.send_signal(signal.SIGTERM)  # asks for a stop after the step
    while process.poll() is None:  # the first of them may arrive together with SIGTERM, in any order
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    errors = process.stderr.read()
    assert process.returncode == 128 + signal.SIGINT
    assert "distrust: ended by SIGINT, without an answer for 0.3 s\n" in errors


@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_rank_says_that_all_are_ended(monkeypatch, capfd, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit, match="143"):
        watchdog._end(signal.SIGTERM)
    assert ("distrust: ended by SIGTERM" in capfd.readouterr().err) == (rank == "0")
