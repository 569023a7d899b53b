"""The process of one saver: ``worker.py serve SUBJECT`` and ``worker.py write SUBJECT DIRECTORY MIB STEP``.

``serve`` stays warm: it answers requests, each a line of JSON, until its input ends. What a trial prints is
caught at its file descriptors, so that the words of a library in C++ count too. ``write`` saves until it is
killed, and prints a line before and after each save.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from campaigns.peers.all_subjects import named
from campaigns.peers.subjects import Subject

NUMBER = re.compile(r"[-+]?\d[\d.,:]*(e[-+]?\d+)?")
#: Set in the environment, it leaves a promise of ours out: the campaign has to find that.
FAULT = "CAMPAIGN_FAULT"


def main() -> None:
    """Serve, or write."""
    verb, name, *more = sys.argv[1:]
    _break_what_is_to_be_broken()
    subject = named(name)
    # What it prints is no answer: the answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if verb == "serve":
        _serve(subject, answers)
    else:
        directory, mib, last = more
        subject.write(Path(directory), int(mib), int(last), lambda *event: _send(answers, event))
    answers.flush()
    os._exit(0)  # some libraries hang while they are taken apart


def _serve(subject: Subject, answers: TextIO) -> None:
    warnings.simplefilter("always")
    for line in sys.stdin:
        request = json.loads(line)
        directory, mib = Path(request["directory"]), request["mib"]
        match request["verb"]:
            case "write":
                subject.write(directory, mib, request["last"], lambda *_: None)
                _send(answers, None)
            case "expected":
                _send(answers, subject.expected(directory, mib))
            case "resume":
                _send(answers, _resume(subject, directory, mib))


def _resume(subject: Subject, directory: Path, mib: int) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    gc.collect()
    with _caught() as words:
        try:
            resumed = subject.resume(directory, mib)
        except BaseException as error:  # some libraries panic with one that is no Exception
            answer["error"] = " <- ".join(_told(error))
        else:
            if resumed is not None:
                answer["step"], answer["proof"] = resumed
        gc.collect()  # tasks that failed complain when they are collected: now, not in the next trial
    told = {NUMBER.sub("#", line.replace(str(directory), "").strip()) for line in words}
    return {**answer, "words": sorted(told - {""})}


def _told(error: BaseException | None) -> Iterator[str]:
    """The error, and what it came of."""
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__ or error.__context__


@contextmanager
def _caught() -> Iterator[list[str]]:
    """What is printed meanwhile, by whomever; the lines are there afterwards."""
    lines: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            yield lines
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, saved in zip((1, 2), before, strict=True):
                os.dup2(saved, descriptor)
                os.close(saved)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def _send(answers: TextIO, answer: Any) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def _break_what_is_to_be_broken() -> None:
    if os.environ.get(FAULT) == "digests":
        from distrust.checkpoint import verified_read

        verified_read.check_digest = lambda *_: None


if __name__ == "__main__":
    main()
