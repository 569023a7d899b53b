"""The campaign of hostile files runs, and finds every planted fault.

Its command is run as a process: it forks, and limits the memory of its children.
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
from campaigns.fuzz import (
    commands,
    converting,
    families,
    forging,
    growing,
    imports,
    model_folders,
    older,
    readers,
    texts,
)
from campaigns.fuzz.__main__ import TURNS, Plan
from distrust.importers.convert import ConvertedCheckpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory by means of Linux")

ROOT = Path(__file__).resolve().parent.parent.parent
ATHERIS = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="no atheris")
READING = [*families.CHANGES, *families.FILES, "obstacles", *older.FAMILIES]
MEASURING = ["permissions", "writing", *growing.GROWING]
NAMED = [
    *READING, *MEASURING, *imports.FAMILIES, *commands.LIGHT, *texts.FAMILIES, *commands.MODELS,
    *model_folders.FAMILIES,
]  # fmt: skip
#: The first case of each kind at random.
RANDOM_FILES, RANDOM_FOLDERS, RANDOM_COMMANDS, RANDOM_MODELS = (
    len(NAMED) + TURNS.index(kind) for kind in ("files", "folders", "commands", "models")
)


def number(name: str) -> int:
    return NAMED.index(name)


@pytest.fixture
def campaign(run_python, forked_fuzz, tmp_path, monkeypatch):
    """Runs the command, with a fault put into the product; returns exit code and output.

    A fork has imported the product: another source, and what counts its edges, need Python itself.
    """
    monkeypatch.chdir(tmp_path)

    def campaign(
        *arguments: object, fault: str = "", source: Path = ROOT / "src", python: Path | str = forked_fuzz
    ) -> tuple[int, str]:
        code = f"""
import sys
{fault}
from campaigns.fuzz.__main__ import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
        paths = os.pathsep.join((str(source), str(ROOT)))
        result = run_python(code, *arguments, seconds=300, python=python, PYTHONPATH=paths)  # if it hangs
        assert "Traceback" not in result.stderr, result.stderr
        return result.returncode, result.stdout

    return campaign


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return readers.Directory(folder / "files", *forging.make_specimens(folder / "specimens"))


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
    code, output = campaign("--case", number(name))
    assert (code, "every invariant held" in output) == (0, True), output


def test_files_at_random(campaign, tmp_path):
    code, output = campaign("--case", RANDOM_FILES, "--seed", 5, "--json", tmp_path / "figures.json")
    assert code == 0, output
    counts = json.loads((tmp_path / "figures.json").read_text())["counts"]
    assert counts["files read in memory"] == 400
    # Files that are refused at once, some that are refused late, and valid ones.
    for answer in ("CorruptCheckpoint by parse_header", "CorruptCheckpoint by sections", "intact"):
        assert counts[f"answers in memory: {answer}"] > 2


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_folders_of_other_programs_are_converted_and_resumed(campaign, forked_python, tmp_path):
    figures = ["--json", tmp_path / "figures.json"]
    code, output = campaign("--case", RANDOM_FOLDERS, "--seed", 2, *figures, python=forked_python)
    assert code == 0, output
    counts = json.loads((tmp_path / "figures.json").read_text())["counts"]
    # Some were harmless, and some were not.
    converted, resumed = "folders of other programs given to convert", "of them resumed"
    for name in (f"{converted}: converted", f"{converted}: damaged", f"{resumed} torch: ok"):
        assert counts[name] > 0, counts


def test_commands_on_hostile_folders_at_random(campaign, tmp_path):
    code, output = campaign("--case", RANDOM_COMMANDS, "--seed", 3, "--json", tmp_path / "figures.json")
    assert code == 0, output
    counts = json.loads((tmp_path / "figures.json").read_text())["counts"]
    answers = {
        # An output that is no file is a failure to write, never a wrong usage.
        "links and special files at the names of commands": (0, 1),
        "data, logs and settings": (0, 1, 2),  # some were harmless, some were not
    }
    for kind in answers:
        for answer in answers[kind]:
            assert counts[f"{kind}: exit code {answer}"] > 0, counts


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_hostile_model_folders_at_random(campaign, forked_python, tmp_path):
    figures = ["--json", tmp_path / "figures.json"]
    code, output = campaign("--case", RANDOM_MODELS, "--seed", 3, *figures, python=forked_python)
    assert code == 0, output
    counts = json.loads((tmp_path / "figures.json").read_text())["counts"]
    for answer in (0, 1):
        assert counts[f"model and adapter folders: exit code {answer}"] > 0, counts


def test_expensive_files(campaign):
    code, output = campaign("--case", number("keys of one hash"), "--mebibytes", 0.1)
    assert (code, "times its size" in output) == (0, True), output


@settings(max_examples=300)
@given(st.integers(0))
def test_every_forged_file_gets_a_documented_answer(directory, seed):
    rng = Random(seed)
    raw = families.mutate(rng.choice(directory.specimens), rng)
    readers.read_in_memory(raw, directory.valid, readers.Answers())


@pytest.mark.parametrize("name", growing.GROWING)
def test_growing_files_are_signed_and_grow(name):
    """Else the reader would stop at the digest, and its cost would mean nothing."""
    small, large = (growing.GROWING[name](nbytes) for nbytes in (20_000, 80_000))
    assert len(large) > len(small)
    specimen = forging.Specimen(small)
    if name != "noise with a valid beginning":
        assert forging.sign(small[: specimen.end]) == small[: specimen.end]


FAULTS = {
    "a number is not checked": (
        "metadata", "ValueError",
        "from distrust.checkpoint import header\nheader._integer = lambda text, name: int(text)",
    ),
    "canonical form is not checked": (
        "keys", "duplicate key",
        """
from distrust.checkpoint import header
header._require_same = lambda text, encoded: None
from campaigns.fuzz import families
def add_duplicate(draft, rng):
    draft.run = '{"created":"","extra":{},"extra":{},"host":"","metrics":{}}'
families.CHANGES["keys"] = add_duplicate
""",
    ),
    "a pipe is waited for": (
        "obstacles", "no answer within",
        "import os\nos.O_NONBLOCK = 0\nfrom campaigns import child\nchild.HANG_SECONDS = 2",
    ),
    "a link is followed by a writer": ("writing", "a link in the place of the lock",
    "import os\nos.O_NOFOLLOW = 0"),
    "a file is open to all": (
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
        "older: another's files", "was accepted",
        "from distrust.importers import npz_folder\nnpz_folder.require_checksum = lambda *_: None",
    ),
    "a bomb is let in": (
        "older: bombs", "CheckpointUnreadable",
        "from distrust.importers import npz\nnpz.MAX_EXPANSION = npz.SMALL_BYTES = 10**9",
    ),
    "convert raises an undocumented error": (
        "older: metadata", "convert: ValueError",
        """
from distrust.importers import convert
def read(*_):
    raise ValueError
convert.read = read
""",
    ),
    "control characters are printed": (
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
    "a directory of checkpoints is followed": (
        "prune", "outside/checkpoints", "from distrust import paths\npaths.refuse_links = lambda *_: None"
    ),
    "a log has no bound": (
        "texts: sparse", "emory",
        """
from distrust.reporting import run_reader
run_reader.MAX_LOG_BYTES = run_reader.MAX_LINE_BYTES = 1 << 50
""",
    ),
    "an archive has no bound": (
        "texts: bombs", "emory",
        "from distrust.config import TrainConfig\nTrainConfig.max_record_bytes = (1 << 31) - 1",
    ),
    "code of a model is run": (
        "models: code", "code of the folder was run",
        """
import os
os.environ["HF_HOME"] = os.path.abspath("hub")
from transformers import AutoConfig
load = AutoConfig.from_pretrained
AutoConfig.from_pretrained = lambda *names, **options: load(*names, **{**options, "trust_remote_code": True})
""",
    ),
    "keys of one hash are taken": (
        "keys of one hash", "keys of one hash: ",
        "from distrust.checkpoint import tree\ntree.MAX_EQUAL_HASHES = 10**9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_found_again(campaign, forked_python, forked_fuzz, fault):
    name, finding, code = FAULTS[fault]
    # Quadratic growth shows only in files that are large enough.
    mebibytes = 0.25 if name == "keys of one hash" else 0.15
    python = forked_python if name in commands.MODELS or name in model_folders.FAMILIES else forked_fuzz
    options = ["--seed", 2, "--case", number(name), "--mebibytes", mebibytes]
    result, output = campaign(*options, fault=code, python=python)
    assert (result, "COUNTEREXAMPLE" in output, finding in output) == (1, True, True), output
    assert f"again: python -m campaigns.fuzz --seed 2 --case {number(name)}" in output


def test_the_numbers_of_the_cases_are_those_of_the_plan():
    plan = Plan(["a", "b"], {kind: kind for kind in TURNS})
    assert [plan.step(case) for case in range(2 + len(TURNS) + 1)] == ["a", "b", *TURNS, TURNS[0]]
    assert plan._replace(named=(), turns=("models",)).step(7) == "models"


def test_a_process_that_died_or_hangs_is_restarted(run_python):
    code = """
import os, time
from campaigns.campaign import CounterExample
from campaigns import child
from campaigns.fuzz import costs
from collections import Counter
child.HANG_SECONDS = 0.3
work = {0: lambda: os.abort(), 1: lambda: time.sleep(9), 2: lambda: Counter(ok=1)}
with costs.worker(lambda number: work[number](), allowed=1 << 26) as worker:
    for number in (2, 0, 2, 1, 2):
        try:
            print(worker.request(number)["ok"])
        except CounterExample as error:
            print(str(error).splitlines()[0])
"""
    output = run_python(code, PYTHONPATH=os.pathsep.join((str(ROOT / "src"), str(ROOT)))).stdout
    died, hangs = "the process died: exit code -6", "no answer within 0.3 s"
    assert output.splitlines() == ["1", died, "1", hangs, "1"]


def older_folder(tmp_path: Path) -> Path:
    older.write_folder(tmp_path / "checkpoint-1")
    return tmp_path / "checkpoint-1"


def change_source(source, to, **_):
    (source / "metadata.json").touch()
    return []


def report_missing_target(source, to, **_):
    return [
        ConvertedCheckpoint(
            source, "converted", step=1, target=to / "checkpoints" / "checkpoint-1.safetensors"
        )
    ]


def give_two_lines(source, to, **_):
    return [ConvertedCheckpoint(source, "damaged", "one\ntwo")]


def leave_a_file(source, to, **_):
    (to / "checkpoints").mkdir(parents=True)
    (to / "checkpoints" / "left").touch()
    return [ConvertedCheckpoint(source, "damaged", "so")]


FAULTY = {
    change_source: "not as it was",
    report_missing_target: "does not verify",
    give_two_lines: "several lines",
    leave_a_file: "'left'",
}


@pytest.mark.parametrize("faulty", FAULTY)
def test_the_invariants_of_convert_are_checked(tmp_path, monkeypatch, faulty):
    source = older_folder(tmp_path)
    assert [result.outcome for result in converting.convert_and_check(source, tmp_path / "ok")] == [
        "converted"
    ]
    monkeypatch.setattr(converting, "convert", faulty)
    with pytest.raises(CounterExample, match=FAULTY[faulty]):
        converting.convert_and_check(source, tmp_path / "to")


def test_an_accepted_file_must_make_sense(directory):
    """The campaign's own check, on a file that it has to refuse."""
    specimen = directory.specimens[0]
    header = directory.valid.header
    with pytest.raises(CounterExample, match="other tensors"):
        readers.require_sense(header, specimen.raw)


@ATHERIS
def test_the_guided_engine(campaign):
    code, output = campaign("--engine", "guided", "--cases", 1000, python=sys.executable)
    assert code == 0, output
    assert "1,000  executions" in output
    assert "edges of the reader's code reached" in output


@ATHERIS
def test_a_finding_of_the_guided_engine_is_kept_and_found_again(campaign, tmp_path):
    source = shutil.copytree(ROOT / "src", tmp_path / "src")
    header = source / "distrust/checkpoint/header.py"
    original = header.read_text()
    fault = original.replace("if not digits or text != str(int(text)):", "if text != str(int(text)):")
    assert fault != original
    header.write_text(fault)
    with_fault = {"source": source, "python": sys.executable}
    code, output = campaign("--engine", "guided", "--cases", 5000, **with_fault)
    assert (code, "in memory: " in output) == (1, True), output
    finding = tmp_path / "counterexample.safetensors"
    assert f"again: python -m campaigns.fuzz --replay {finding}" in output
    code, again = campaign("--replay", finding, **with_fault)
    text = output.partition("COUNTEREXAMPLE: ")[2].partition("; again")[0]
    assert (code, f"COUNTEREXAMPLE: {text}" in again) == (1, True), again
    assert campaign("--replay", finding)[0] == 0
