"""The docs name what there is: options, commands, imports."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest

from distrust import TrainConfig
from distrust.cli import COMMANDS
from distrust.cli.launch import Launch
from distrust.config import flag

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FLAGS = {flag(field.name) for field in fields(TrainConfig)}
OF_LAUNCHER = {flag(field.name) for field in fields(Launch)}


def rows():
    """(section, theirs, ours, note) of each row of docs/coming-from.md."""
    section = ""
    for line in (DOCS / "coming-from.md").read_text("utf-8").splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        elif line.startswith("| ") and "| theirs |" not in line:
            their_option, our_option, note = (cell.strip() for cell in line.strip("|").split("|"))
            yield section, their_option, our_option, note


#: Flags of distrust train that are no options of a run.
TRAIN_FLAGS = {"--config", "--resume", "--nproc", "--nnodes", "--rendezvous", "--max-restarts"}


def test_what_is_named_as_ours_is_there():
    named = {name for *_, our_option, _ in rows() for name in re.findall(r"`([^`]+)`", our_option)}
    flags = {name for name in named if name.startswith("--")} - TRAIN_FLAGS
    commands = {name.removeprefix("distrust ") for name in named if name.startswith("distrust ")}
    assert flags <= FLAGS | OF_LAUNCHER
    assert commands <= COMMANDS.keys()
    assert named - {f"distrust {name}" for name in commands} - flags - TRAIN_FLAGS == {"TrainConfig"}


def test_every_row_says_something_and_only_once():
    names = set()
    for section, their_option, our_option, note in rows():
        assert our_option or note, their_option
        for name in re.findall(r"`([^`]+)`", their_option):
            assert (section, name) not in names, name
            names.add((section, name))


@pytest.mark.parametrize("section", ["`SFTConfig` and `TrainingArguments`", "axolotl", "mlx-lm"])
def test_what_everybody_sets_is_found(section):
    our_option = {
        name
        for row_section, _, cell, _ in rows()
        if row_section == section
        for name in re.findall(r"`([^`]+)`", cell)
    }
    everyday = {
        "--out",
        "--batch-size",
        "--gradient-accumulation",
        "--learning-rate",
        "--max-length",
        "--seed",
    }
    assert everyday | {"--schedule", "--save-every", "--eval-every"} <= our_option


def test_flags_in_notes_are_there_too():
    """Beside ours, notes name flags of the commands and of theirs."""
    of_commands = {"--best", "--compare", "--format", *TRAIN_FLAGS}
    for *_, note in rows():
        for name in re.findall(r"--[a-z][a-z0-9-]+", note):
            assert name in FLAGS | OF_LAUNCHER | of_commands, name


def test_the_reference_of_options_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_options", ROOT / "scripts" / "make_options.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = (DOCS / "options.md").read_text("utf-8")
    assert written == script.table(), "run python scripts/make_options.py"
    assert all(f"| `{name}` |" in written for name in FLAGS)


def test_python_in_the_docs_is_python_and_imports_what_there_is():
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        compile(block, "docs/python.md", "exec")
        imports = [line for line in block.splitlines() if line.startswith("from distrust")]
        exec("\n".join(imports), {})


def test_events_are_told_in_the_docs_as_they_are():
    from distrust.training import events

    text = (DOCS / "python.md").read_text("utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", text, re.MULTILINE))
    assert set(table) == {kind.__name__ for kind in events.Event.__args__}
    for name, cell in table.items():
        kind = getattr(events, name)
        allowed = {
            *kind.__dataclass_fields__,
            *(key for key, value in vars(kind).items() if isinstance(value, property)),
        }
        assert set(re.findall(r"`(\w+)`", cell)) <= allowed, name
    for reason in events.Reason.__args__:
        assert reason == "error" or f"`{reason}`" in text


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *DOCS.glob("*.md")]), ids=lambda page: page.stem)
def test_no_place_is_held_for_something_to_come(page):
    assert not re.findall(r"^[A-Z_]{4,}$", page.read_text("utf-8"), flags=re.MULTILINE)


def test_the_index_names_every_command_once():
    commands = re.findall(r"^\| `distrust (\w+)", (DOCS / "README.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(commands) == sorted(COMMANDS)


def test_the_index_names_every_page():
    linked = set(re.findall(r"\]\((\w[\w-]*\.md)\)", (DOCS / "README.md").read_text("utf-8")))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"README.md"}


def test_the_architecture_page_names_every_module():
    spec = importlib.util.spec_from_file_location(
        "make_architecture", ROOT / "scripts" / "make_architecture.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (DOCS / "architecture.md").read_text("utf-8")
    assert text == script.page(text), "run python scripts/make_architecture.py"
    paths = [
        name
        for cell in re.findall(r"^\|[^|]*\|([^|]*)\|$", text, re.MULTILINE)
        for name in re.findall(r"`(\S+?)`", cell)
    ]
    assert paths
    missing = [path for path in paths if not [*(ROOT / "src" / "distrust").rglob(path.strip("/"))]]
    assert missing == []


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text("utf-8"))
    assert [link for link in links if not (DOCS / link).exists()] == []
