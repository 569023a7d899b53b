"""The processes of a trial: one that stays warm and answers, and one that is killed during a save."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any, Self

from campaigns.child import ANSWER_SECONDS, Child, ChildFailed
from campaigns.peers.outcomes import Reply
from campaigns.peers.subjects import SAVES, Subject
from campaigns.peers.worker import FAULT

#: The first save that may be killed: two exist by then, and the duration of the second is known.
FIRST_KILLED = 3
ATTEMPTS = 20  # until a kill comes during a save


def start(*arguments: str, fault: str | None) -> Child:
    """A worker of one saver, without a network or a progress bar."""
    environment = {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    environment["TQDM_DISABLE"] = "1"  # a progress bar is not a message about damage
    environment |= {FAULT: fault} if fault else {}
    return Child("campaigns.peers.worker", *arguments, environment=environment)


class WarmProcess:
    """The warm process of a saver, restarted after a trial that ended it; a context."""

    def __init__(self, subject: Subject, *, fault: str | None) -> None:
        self._subject = subject
        self._fault = fault
        self._child: Child | None = None
        self.usual_words: set[str] = set()  # what it prints of a directory without damage

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    def write(self, directory: Path, mib: int, last: int) -> None:
        """Save all checkpoints up to the step ``last``."""
        self._require({"verb": "write", "directory": str(directory), "mib": mib, "last": last})

    def expected_proofs(self, directory: Path, mib: int) -> dict[int, str]:
        answer = self._require({"verb": "expected", "directory": str(directory), "mib": mib})
        return {int(step): proof for step, proof in answer.items()}

    def resume(self, directory: Path, mib: int) -> Reply:
        try:
            answer = self._ask({"verb": "resume", "directory": str(directory), "mib": mib})
        except ChildFailed as error:
            return Reply(crashed=str(error))
        words = tuple(word for word in answer["words"] if word not in self.usual_words)
        return Reply(answer.get("step"), answer.get("proof"), answer.get("error"), str(directory), words)

    def _require(self, request: dict[str, Any]) -> Any:
        try:
            return self._ask(request)
        except ChildFailed as error:
            raise RuntimeError(f"{self._subject.name}: {request['verb']}: {error}") from error

    def _ask(self, request: dict[str, Any]) -> Any:
        if self._child is None:
            self._child = start("serve", self._subject.name, fault=self._fault)
        try:
            self._child.send(request)
            return self._child.receive_json()
        except ChildFailed:
            self._stop()
            raise

    def _stop(self) -> None:
        if self._child is not None:
            self._child.__exit__()
        self._child = None


def kill_during_save(
    subject: Subject, parent: Path, mib: int, rng: random.Random, *, fault: str | None
) -> tuple[Path, int, str]:
    """Kill a process at a random instant of a save; the directory, the step being saved, a description."""
    for attempt in range(ATTEMPTS):
        directory = parent / f"attempt-{attempt}"
        arguments = ("write", subject.name, str(directory), str(mib), str(SAVES * subject.interval))
        with start(*arguments, fault=fault) as child:
            kill = _kill_once(child, subject, rng)
        if kill is not None:
            return directory, *kill
    raise RuntimeError(f"{subject.name}: no kill came during a save in {ATTEMPTS} processes")


def _kill_once(child: Child, subject: Subject, rng: random.Random) -> tuple[int, str] | None:
    """The step and a description; None if every save ended before its kill."""
    duration = 0.0
    while True:
        if (begun := child.read_line()) is None:
            raise RuntimeError("the writer hangs")
        if not begun:
            return None
        step = int(json.loads(begun)[1])
        began = time.monotonic()
        delay = rng.random() * duration if step >= FIRST_KILLED * subject.interval else ANSWER_SECONDS
        line = child.read_line(delay)
        if line is None:
            child.kill()
            if child.read_line(0.0):  # it was reported before the signal came
                return None
            return step, f"killed {delay * 1000:.0f} ms into a save of about {duration * 1000:.0f} ms"
        if not line:
            raise RuntimeError(f"{subject.name}: the writer ended during a save")
        duration = time.monotonic() - began
