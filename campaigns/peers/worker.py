"""The process of one saver: ``worker serve SUBJECT`` and ``worker write SUBJECT DIRECTORY MIB STEP``.

``serve`` answers requests, lines of JSON, and captures what a trial prints at the file descriptors, so that
messages of C++ libraries count, too. ``write`` saves until it is killed, and reports before and after a save.
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

from campaigns.peers.all_subjects import find_subject
from campaigns.peers.subjects import Subject

NUMBER = re.compile(r"[-+]?\d[\d.,:]*(e[-+]?\d+)?")  # numbers differ from run to run
#: Environment variable: a check of ours to leave out, which the campaign has to find.
FAULT = "CAMPAIGN_FAULT"


def main() -> None:
    verb, name, *arguments = sys.argv[1:]
    _plant_fault()
    subject = find_subject(name)
    # Answers have a descriptor of their own: what a library prints is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if verb == "serve":
        _serve(subject, answers)
    else:
        directory, mib, last = arguments
        subject.write(Path(directory), int(mib), int(last), lambda *event: _send(answers, event))
    answers.flush()
    os._exit(0)  # some libraries hang at the interpreter's end


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
                _send(answers, subject.expected_proofs(directory, mib))
            case "resume":
                _send(answers, _resume(subject, directory, mib))


def _resume(subject: Subject, directory: Path, mib: int) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    gc.collect()
    with _capture_output() as lines:
        try:
            resumed = subject.resume(directory, mib)
        except BaseException as error:  # some libraries raise one that is no Exception
            answer["error"] = " <- ".join(_error_chain(error))
        else:
            if resumed is not None:
                answer["step"], answer["proof"] = resumed
        gc.collect()  # failed tasks print when they are collected: now, not in the next trial
    words = {NUMBER.sub("#", line.replace(str(directory), "").strip()) for line in lines}
    return {**answer, "words": sorted(words - {""})}


def _error_chain(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__ or error.__context__


@contextmanager
def _capture_output() -> Iterator[list[str]]:
    """Capture what is printed; the lines are in the list afterwards."""
    lines: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            yield lines
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def _send(answers: TextIO, answer: Any) -> None:
    print(json.dumps(answer), file=answers, flush=True)


def _plant_fault() -> None:
    if os.environ.get(FAULT) == "digests":
        from distrust.checkpoint import verified_read

        verified_read.check_digest = lambda *_: None


if __name__ == "__main__":
    main()
