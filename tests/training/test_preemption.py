"""Preemption notices stop a run like SIGTERM: the step is saved, and the command ends with 143."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from distrust import CheckpointManager, ConfigError, DistrustWarning
from distrust.testing.models import make_model, train_arguments, write_records
from distrust.training.events import Preparing, StepEnded

ENDLESS = ["--max-steps", 10**6, "--epochs", 10**6, "--save-every", 0, "--no-step-snapshots"]
COMMAND = """
import os, sys
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
from distrust.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preemption")
    make_model(folder / "model")
    write_records(folder / "data.jsonl")
    return folder


@pytest.fixture
def preempt(start_python, forked_python, folder, tmp_path):
    """Trains by the command, and calls a function with the process id once it makes steps."""

    def preempt(give_notice: Callable[..., object], *options: object) -> tuple[int, str, str]:
        run = tmp_path / "run"
        arguments = train_arguments(folder, run, *ENDLESS, *options)
        process = start_python(COMMAND, tmp_path / "pid", *arguments, python=forked_python)
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        give_notice(int((tmp_path / "pid").read_text()))
        out, err = process.communicate(timeout=30)  # the grace period of Kubernetes
        return process.returncode, out, err

    return preempt


def saved_step(out, run):
    """The step that a command says is saved; it is."""
    (line,) = [line for line in out.splitlines() if line.startswith("Stopped by ")]
    manager = CheckpointManager(run / "checkpoints")
    (step,) = manager.list_checkpoints()
    manager.validate(step)
    assert f": step {step} is saved. Run the same command to resume" in line
    return line.partition(": step")[0]


def test_a_file_appears(preempt, tmp_path):
    notice = tmp_path / "preempted"
    options = ("--on-preemption", f"file:{notice}", "command:test -e /nowhere")
    code, out, err = preempt(lambda _: notice.touch(), *options)
    assert code == 128 + signal.SIGTERM
    (line,) = err.splitlines()
    assert line.startswith(f"distrust: warning: preemption notice (file:{notice}, 20")
    assert line.endswith(" UTC): the run saves after this step, and ends")
    assert saved_step(out, tmp_path / "run").startswith(f"Stopped by a preemption notice (file:{notice}, 20")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1], ids=["Kubernetes", "SLURM, --signal=USR1@120"]
)
def test_the_signals_of_schedulers(preempt, tmp_path, number):
    """The step is saved and mirrored by the time the command ends."""
    code, out, err = preempt(lambda pid: os.kill(pid, number), "--mirror", tmp_path / "mirror")
    assert (code, err) == (128 + number, "")
    assert saved_step(out, tmp_path / "run") == f"Stopped by {signal.Signals(number).name}"
    (local,) = (tmp_path / "run/checkpoints").glob("*.safetensors")
    (remote,) = (tmp_path / "mirror/checkpoints").glob("*.safetensors")
    assert remote.read_bytes() == local.read_bytes()


@pytest.mark.parametrize("line", ["touch 'ran twice'", "sh -c 'echo no; touch \"ran twice\"'"])
def test_a_command_succeeds(run, tmp_path, monkeypatch, line):
    """It runs without a shell, and its first success stops even the preparation."""
    monkeypatch.chdir(tmp_path)

    def wait(event):
        if isinstance(event, Preparing):
            deadline = time.monotonic() + 20
            while not os.path.exists("ran twice") or time.monotonic() < deadline - 19.5:
                assert time.monotonic() < deadline
                time.sleep(0.02)

    with pytest.warns(DistrustWarning, match="preemption notice"):
        ended, _ = run(tmp_path / "run", observers=[wait], on_preemption=(f"command:{line}",))
    assert (ended.step, ended.path, ended.signal) == (0, None, signal.SIGTERM)
    assert ended.notice.startswith(f"command:{line}, 20")


def test_a_command_that_hangs_ends_with_the_run(run, tmp_path):
    """With what it has started."""
    line = f"sh -c 'sleep 60 & echo $! > {tmp_path}/pid; wait'"

    def wait(event):
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.02)

    run(tmp_path / "run", observers=[wait], on_preemption=(f"command:{line}",))
    stat = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/stat")
    deadline = time.monotonic() + 20
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("line", ["'open", "   "])
def test_a_wrong_command_is_refused(run, tmp_path, line):
    with pytest.raises(ConfigError, match=r"--on-preemption command:.*no command line"):
        run(tmp_path / "run", on_preemption=(f"command:{line}",))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("notice", ["command:/nowhere/program x", "command:false", "file:/nowhere/x"])
def test_a_notice_that_does_not_come_changes_nothing(run, alone, tmp_path, notice):
    if "program" in notice:
        with pytest.warns(DistrustWarning, match="program x: the check failed .*No such file.*tried again"):
            ended, _ = run(tmp_path / "run", observers=[lambda _: time.sleep(0.02)], on_preemption=(notice,))
    else:
        ended, _ = run(tmp_path / "run", on_preemption=(notice,))
    assert (ended.state_digest, ended.finished, ended.notice) == (alone.state_digest, True, None)


EVENTS = "/metadata/scheduledevents?api-version=2019-08-01"


def azure_event(kind, *machines):
    return json.dumps({"DocumentIncarnation": 1, "Events": [{"EventType": kind, "Resources": [*machines]}]})


#: Of each provider: the header that a question must have, answers by path without a notice, and with one.
PROVIDERS = {
    "aws": (
        ("X-aws-ec2-metadata-token", "secret"),
        {"/latest/api/token": "secret", "/latest/meta-data/events/recommendations/rebalance": "{}"},
        {"/latest/meta-data/spot/instance-action": '{"action": "stop", "time": "2026-11-28T09:30:00Z"}'},
    ),
    "gcp": (
        ("Metadata-Flavor", "Google"),
        {"/computeMetadata/v1/instance/preempted": "FALSE"},
        {"/computeMetadata/v1/instance/preempted": "TRUE\n"},
    ),
    "azure": (
        ("Metadata", "true"),
        {
            "/metadata/instance/compute/name?api-version=2019-08-01&format=text": "spot_1",
            EVENTS: azure_event("Preempt", "spot_2")[:-2] + ", " + azure_event("Reboot", "spot_1")[38:],
        },
        {EVENTS: azure_event("Preempt", "spot_0", "SPOT_1")},
    ),
}


class Metadata(BaseHTTPRequestHandler):
    """Answers like the metadata address of a provider."""

    server: MetadataServer

    def do_GET(self) -> None:
        name, value = self.server.header
        answer = self.server.answers.get(self.path)
        is_asking_for_token = self.path == "/latest/api/token" and self.command == "PUT"
        is_allowed = is_asking_for_token or (self.headers[name] == value and self.command == "GET")
        self.send_response(401 if not is_allowed else 404 if answer is None else 200)
        self.end_headers()
        self.wfile.write((answer or "no such thing").encode())
        self.server.paths.append(self.path)

    do_PUT = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


class MetadataServer(ThreadingHTTPServer):
    header: tuple[str, str]
    answers: dict[str, str]
    paths: list[str]


@pytest.fixture
def server(monkeypatch) -> Iterator[MetadataServer]:
    with MetadataServer(("127.0.0.1", 0), Metadata) as server:
        server.paths = []
        monkeypatch.setenv("DISTRUST_METADATA_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server
        server.shutdown()


def slowly(give_notice, step=20):
    """An observer that gives the notice after a step, and lets steps take time."""

    def observe(event):
        if isinstance(event, StepEnded):
            time.sleep(0.01)
            if event.step == step:
                give_notice()

    return observe


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_provider_gives_notice(run, tmp_path, server, provider):
    server.header, server.answers, notice = PROVIDERS[provider]
    server.answers = dict(server.answers)
    give = slowly(lambda: server.answers.update(notice))
    with pytest.warns(DistrustWarning, match=rf"^preemption notice \({provider}, ") as caught:
        ended, _ = run(
            tmp_path, observers=[give], on_preemption=(provider,), max_steps=2000, save_every=0, keep_best=0
        )
    assert len(caught) == 1
    assert 20 <= ended.step < 2000
    assert (ended.reason, ended.signal) == ("signal", signal.SIGTERM)
    CheckpointManager(tmp_path / "checkpoints").validate(ended.step)


@pytest.mark.parametrize("answer", [None, "<html>"])
def test_a_provider_that_answers_wrongly_is_warned_of_once(run, alone, tmp_path, server, answer):
    server.header, server.answers = ("Metadata", "true"), dict.fromkeys(PROVIDERS["azure"][1], answer)
    server.answers.update(dict.fromkeys(PROVIDERS["gcp"][1], answer))
    with pytest.warns(DistrustWarning, match=r"^--on-preemption \w+: the check failed \(") as caught:
        ended, _ = run(tmp_path / "run", observers=[lambda _: time.sleep(0.05)], on_preemption=(*PROVIDERS,))
    assert sorted(str(warning.message).split()[1] for warning in caught) == ["aws:", "azure:", "gcp:"]
    assert len(server.paths) > len({*server.paths})  # it is tried again
    assert ended.state_digest == alone.state_digest
