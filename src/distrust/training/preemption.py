"""Preemption notices: a machine says that it is about to be taken away. They stop a run as SIGTERM does.

A thread for each notice of ``on_preemption`` looks for it until the run ends; nothing else is contacted. A
check that fails is warned of once and repeated: a run must not end because a notice cannot be seen.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any
from urllib.parse import urlsplit

from distrust.errors import ConfigError, shorten, warn
from distrust.training.process import StopRequest

#: Environment variable with another address than the link-local one of all three providers, for tests.
ENDPOINT = "DISTRUST_METADATA_ENDPOINT"
COMMAND_SECONDS, ANSWER_SECONDS = 10.0, 2.0  # time limits: of a command, and of each part of an answer
MAX_ANSWER_BYTES = 1 << 20


@contextmanager
def watch_notices(notices: tuple[str, ...], stop: StopRequest) -> Iterator[None]:
    """Context manager that asks a run to stop at the first notice; raises ConfigError for a wrong command."""
    ended = threading.Event()

    def watch(notice: str, is_given: Callable[[], bool]) -> None:
        seconds, warned = 5.0 if notice.startswith("command:") else 1.0, False
        while not ended.is_set():
            try:
                if is_given():
                    stop.give_notice(f"{notice}, {datetime.now(UTC):%F %T} UTC")
                    return
            except Exception as error:  # also of an answer in another form than documented
                if not warned and not ended.is_set():
                    warned = True
                    reason = shorten(str(error)) or type(error).__name__
                    warn(f"--on-preemption {notice}: the check failed ({reason}); it is tried again")
            ended.wait(seconds)

    checks = [(notice, _check(notice, ended)) for notice in notices]
    # Daemons: a question without an answer must not hold up the end of the process.
    threads = [threading.Thread(target=watch, args=check, daemon=True) for check in checks]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join(ANSWER_SECONDS / 2)


def _check(notice: str, ended: threading.Event) -> Callable[[], bool]:
    kind, _, value = notice.partition(":")
    if kind == "file":
        return Path(value).exists
    if kind != "command":
        return {"aws": _ask_aws, "gcp": _ask_gcp, "azure": _ask_azure}[kind]
    try:
        words = shlex.split(value)
        words[0]
    except (ValueError, IndexError) as error:
        raise ConfigError(f"--on-preemption {notice}: this is no command line ({error})") from None
    return lambda: _succeeds(words, ended)


def _succeeds(words: list[str], ended: threading.Event) -> bool:
    """Whether a command ends with 0. What it has started ends with it at its time limit, and with the run."""
    options: dict[str, Any] = {"stdin": DEVNULL, "stdout": DEVNULL, "stderr": DEVNULL}
    # In a session of its own: Ctrl-C is for the run alone.
    with Popen(words, start_new_session=True, **options) as process:  # noqa: S603 - the user's, without a shell
        deadline = time.monotonic() + COMMAND_SECONDS
        while process.poll() is None:
            if ended.wait(0.05) or time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                raise TimeoutError(f"it did not end within {COMMAND_SECONDS:g} s")
        return process.returncode == 0


def _ask_aws() -> bool:
    """Whether a spot instance is to be interrupted; a rebalance recommendation does not count."""
    token = _request("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    headers = {"X-aws-ec2-metadata-token": token}
    return bool(_request("GET", "/latest/meta-data/spot/instance-action", headers, may_be_absent=True))


def _ask_gcp() -> bool:
    path = "/computeMetadata/v1/instance/preempted"
    return {"TRUE": True, "FALSE": False}[_request("GET", path, {"Metadata-Flavor": "Google"})]


def _ask_azure() -> bool:
    """Whether an event takes this machine away: events name all machines of its set."""
    version, headers = "?api-version=2019-08-01", {"Metadata": "true"}
    name = _request("GET", f"/metadata/instance/compute/name{version}&format=text", headers)
    events = json.loads(_request("GET", f"/metadata/scheduledevents{version}", headers))["Events"]
    ending = [event["Resources"] for event in events if event["EventType"] in ("Preempt", "Terminate")]
    return any(name.lower() == resource.lower() for resources in ending for resource in resources)


def _request(method: str, path: str, headers: dict[str, str], *, may_be_absent: bool = False) -> str:
    """The answer, without proxies and redirects; empty if it may be absent and the status is 404."""
    address = urlsplit(os.environ.get(ENDPOINT, "http://169.254.169.254")).netloc
    with closing(HTTPConnection(address, timeout=ANSWER_SECONDS)) as connection:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        if response.status != 200 and not (may_be_absent and response.status == 404):
            raise OSError(f"{method} {path}: status {response.status}")
        return response.read(MAX_ANSWER_BYTES).decode().strip() if response.status == 200 else ""
