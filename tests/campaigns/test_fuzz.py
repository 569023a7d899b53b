"""The campaign of hostile files runs, and it finds what it is there to find.

Its command is run as a process: it forks, and limits what its children may take.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from campaigns.campaign import CounterExample
from campaigns.fuzz import converting, families, forging, imports, older, readers, specimens
from campaigns.fuzz.__main__ import Plan
from distrust.importers.convert import ConvertedCheckpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory by means of Linux")

ROOT = Path(__file__).resolve().parent.parent.parent
ATHERIS = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="no atheris")
READING = [*families.CHANGES, *families.FILES, "obstacles", *older.FAMILIES]
APART = ["permissions", "writing", *families.GROWING]
NAMED = [*READING, *APART, *imports.FAMILIES]
#: The first case with files at random, and the first with folders of other programs at random.
AT_RANDOM, ELSEWHERE_AT_RANDOM = len(NAMED), len(NAMED) + 1


def number(name: str) -> int:
    return NAMED.index(name)


@pytest.fixture
def campaign(run_python, tmp_path, monkeypatch):
    """Runs the command, with a fault put into the product before; returns exit code and output."""
    monkeypatch.chdir(tmp_path)

    def campaign(*arguments: object, fault: str = "", source: Path = ROOT / "src") -> tuple[int, str]:
        code = f"""
import sys
{fault}
from campaigns.fuzz.__main__ import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
        done = run_python(code, *arguments, PYTHONPATH=os.pathsep.join((str(source), str(ROOT))))
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout

    return campaign


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    place = tmp_path_factory.mktemp("hostile")
    return readers.Directory(place / "files", *specimens.make(place / "specimens"))


@pytest.mark.parametrize(
    "name",
    [
        "shape",
        "escapes for a terminal",
        "header lengths",
        "obstacles",
        "permissions",
        "writing",
        "older: bits",
        "older: pickles",
        "older: bombs",
        "older: no files",
        "older: moments in a file",
    ],
)
def test_the_cases_with_a_name(campaign, name):
    code, said = campaign("--case", number(name))
    assert (code, "every promise was kept" in said) == (0, True), said


def test_files_at_random(campaign, tmp_path):
    code, said = campaign("--case", AT_RANDOM, "--seed", 5, "--json", tmp_path / "figures.json")
    assert code == 0, said
    counts = json.loads((tmp_path / "figures.json").read_text())["counts"]
    assert counts["files read in memory"] == 100
    # Files that are refused at once, some that are refused late, and good ones.
    for answer in ("CorruptCheckpoint by parse_header", "CorruptCheckpoint by sections", "whole"):
        assert counts[f"answers in memory: {answer}"] > 2


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_folders_of_other_programs_are_converted_and_gone_on_with(campaign, tmp_path):
    code, said = campaign("--case", ELSEWHERE_AT_RANDOM, "--seed", 2, "--json", tmp_path / "figures.json")
    assert code == 0, said
    counts = json.loads((tmp_path / "figures.json").read_text())["counts"]
    # Some were harmless, and some were not.
    given, gone_on = "folders of other programs given to convert", "of them gone on with"
    for what in (f"{given}: converted", f"{given}: damaged", f"{gone_on} torch: well"):
        assert counts[what] > 0, counts


def test_files_that_cost(campaign):
    code, said = campaign("--case", number("keys of one hash"), "--mebibytes", 0.1)
    assert (code, "times its size" in said) == (0, True), said


@settings(max_examples=300, deadline=None)
@given(st.integers(0))
def test_whatever_is_forged_is_answered_as_promised(directory, seed):
    chance = Random(seed)
    raw = families.mutated(chance.choice(directory.specimens), chance)
    readers.in_memory(raw, directory.good, readers.Answers())


@pytest.mark.parametrize("name", families.GROWING)
def test_what_grows_is_signed_and_grows(name):
    """Else the reader would stop at the digest, and its price would say nothing."""
    small, large = (families.GROWING[name](nbytes) for nbytes in (20_000, 80_000))
    assert len(large) > len(small)
    specimen = forging.Specimen(small)
    if name != "noise that begins well":
        assert forging.signed(small[: specimen.end]) == small[: specimen.end]


FAULTS = {
    "a number is not checked": (
        "metadata", "ValueError",
        "from distrust.checkpoint import header\nheader._integer = lambda text, name: int(text)",
    ),
    "canonical form is not checked": (
        "keys", "stands twice",
        """
from distrust.checkpoint import header
header._require_same = lambda text, encoded: None
from campaigns.fuzz import families
def twice(draft, chance):
    draft.run = '{"created":"","extra":{},"extra":{},"host":"","metrics":{}}'
families.CHANGES["keys"] = twice
""",
    ),
    "a pipe is waited for": (
        "obstacles", "no answer within",
        "import os\nos.O_NONBLOCK = 0\nfrom campaigns.fuzz import costs\ncosts.HANG_SECONDS = 2",
    ),
    "a link is followed by a writer": ("writing", "a link in the place of the lock",
    "import os\nos.O_NOFOLLOW = 0"),
    "permissions are given away": (
        "permissions", "umask 077",
        """
import os
from distrust.checkpoint.disk import Disk
create = Disk.create
def open_to_all(disk, path):
    descriptor = create(disk, path)
    os.fchmod(descriptor, 0o666)
    return descriptor
Disk.create = open_to_all
""",
    ),
    "a checksum is not compared": (
        "older: another's files", "was taken for whole",
        "from distrust.importers import npz_folder\nnpz_folder.require_checksum = lambda *_: None",
    ),
    "a bomb is let in": (
        "older: bombs", "CheckpointUnreadable",
        "from distrust.importers import npz\nnpz.MAX_EXPANSION = npz.SMALL_BYTES = 10**9",
    ),
    "what convert raises is not told": (
        "older: metadata", "convert: ValueError",
        """
from distrust.importers import convert
def read(*_):
    raise ValueError
convert._read = read
""",
    ),
    "a terminal is commanded": (
        "escapes for a terminal", "what is printed holds",
        "from distrust.cli import show\nshow.printable = lambda text: text",
    ),
    "the process dies": (
        "metadata",
        "the process died",
        """
import os
from distrust.checkpoint import header
header._integer = lambda text, name: int(text) if str(text).isdigit() else os._exit(9)
""",
    ),
    "memory is taken": (
        "dtype", "MemoryError",
        """
from distrust.checkpoint import header
text = header.canonical_json
header.canonical_json = lambda value: (bytearray(80_000_000), text(value))[1]
""",
    ),
    "keys of one hash are taken": (
        "keys of one hash", "keys of one hash: ",
        "from distrust.checkpoint import tree\ntree.MAX_EQUAL_HASHES = 10**9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_found_again(campaign, fault):
    name, said_of_it, code = FAULTS[fault]
    # What grows with a square shows in files that are large enough.
    mebibytes = 0.25 if name == "keys of one hash" else 0.15
    result, said = campaign("--seed", 2, "--case", number(name), "--mebibytes", mebibytes, fault=code)
    assert (result, "COUNTEREXAMPLE" in said, said_of_it in said) == (1, True, True), said
    assert f"again: python -m campaigns.fuzz --seed 2 --case {number(name)}" in said


def test_the_numbers_of_the_cases_are_those_of_the_plan():
    plan = Plan(["a", "b"], ["c"], ["d"], "random", "elsewhere")
    assert [plan.step(case) for case in (0, 1, 2, 4, 6)] == ["a", "b", "c", "random", "random"]
    assert [plan.is_apart(case) for case in range(5)] == [False, False, True, False, False]
    of_engines = [plan.of_engines(case) for case in range(10)]
    assert of_engines == [None, None, None, "d", None, "elsewhere", None, None, None, "elsewhere"]


def test_a_process_that_died_or_hangs_begins_again(run_python):
    code = """
import os, time
from campaigns.campaign import CounterExample
from campaigns.fuzz import costs
from campaigns.fuzz.worker import Worker
from collections import Counter
costs.HANG_SECONDS = 0.3
work = {0: lambda: os.abort(), 1: lambda: time.sleep(9), 2: lambda: Counter(well=1)}
with Worker(lambda number: work[number](), allowed=1 << 26) as worker:
    for number in (2, 0, 2, 1, 2):
        try:
            print(worker.do(number)["well"])
        except CounterExample as found:
            print(found)
"""
    said = run_python(code, PYTHONPATH=os.pathsep.join((str(ROOT / "src"), str(ROOT)))).stdout
    died, hangs = "the process died: exit code -6", "no answer within 0.3 s"
    assert said.splitlines() == ["1", died, "1", hangs, "1"]


def harmed(tmp_path: Path) -> Path:
    older.write_folder(tmp_path / "checkpoint-1")
    return tmp_path / "checkpoint-1"


def changes(source, to, **_):
    (source / "metadata.json").touch()
    return []


def takes_without_a_file(source, to, **_):
    return [
        ConvertedCheckpoint(
            source, "converted", step=1, target=to / "checkpoints" / "checkpoint-1.safetensors"
        )
    ]


def tells_in_lines(source, to, **_):
    return [ConvertedCheckpoint(source, "damaged", "one\ntwo")]


def leaves_a_file(source, to, **_):
    (to / "checkpoints").mkdir(parents=True)
    (to / "checkpoints" / "left").touch()
    return [ConvertedCheckpoint(source, "damaged", "so")]


FAULTY = {
    changes: "not as it was",
    takes_without_a_file: "does not verify",
    tells_in_lines: "several lines",
    leaves_a_file: "'left'",
}


@pytest.mark.parametrize("faulty", FAULTY)
def test_what_convert_promises_is_looked_at(tmp_path, monkeypatch, faulty):
    source = harmed(tmp_path)
    assert [one.outcome for one in converting.converted(source, tmp_path / "well")] == ["converted"]
    monkeypatch.setattr(converting, "convert", faulty)
    with pytest.raises(CounterExample, match=FAULTY[faulty]):
        converting.converted(source, tmp_path / "to")


def test_what_is_taken_for_whole_makes_sense(directory):
    """The campaign's own check of sense, on what it has to refuse."""
    specimen = directory.specimens[0]
    header = directory.good.header
    with pytest.raises(CounterExample, match="other tensors"):
        readers.require_sense(header, specimen.raw)


@ATHERIS
def test_the_guided_engine(campaign):
    code, said = campaign("--engine", "guided", "--cases", 1000)
    assert code == 0, said
    assert "1,000  executions" in said
    assert "edges of the reader's code reached" in said


@ATHERIS
def test_what_the_guided_engine_finds_is_kept_and_found_again(campaign, tmp_path):
    source = shutil.copytree(ROOT / "src", tmp_path / "src")
    header = source / "distrust/checkpoint/header.py"
    good = header.read_text()
    fault = good.replace("if not digits or text != str(int(text)):", "if text != str(int(text)):")
    assert fault != good
    header.write_text(fault)
    code, said = campaign("--engine", "guided", "--cases", 5000, source=source)
    assert (code, "in memory: " in said) == (1, True), said
    kept = tmp_path / "counterexample.safetensors"
    assert f"again: python -m campaigns.fuzz --replay {kept}" in said
    code, again = campaign("--replay", kept, source=source)
    found = said.partition("COUNTEREXAMPLE: ")[2].partition("; again")[0]
    assert (code, f"COUNTEREXAMPLE: {found}" in again) == (1, True), again
    assert campaign("--replay", kept)[0] == 0
