"""The campaign that tries the peers: it tells all outcomes apart, in short form on the cheap savers."""

from __future__ import annotations

import json
import os
import random
import re
import signal

import pytest

from campaigns.peers import accidents, all_subjects, state
from campaigns.peers.__main__ import main
from campaigns.peers.outcomes import Outcome, Reply, classify
from campaigns.peers.processes import Warm
from campaigns.peers.subjects import Safetensors, SafetensorsSame
from campaigns.peers.trials import CELLS, after_kill

EXPECTED = {1: "one", 2: "two", 3: "three"}


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (Reply(2, "two"), Outcome.NOTHING_LOST),
        (Reply(3, "three"), Outcome.NOTHING_LOST),  # not reported yet, and whole
        (Reply(1, "one"), Outcome.FELL_BACK),
        (Reply(1, "one", words=("epoch 3 of 7",)), Outcome.FELL_BACK),
        (Reply(1, "one", words=("skipped a damaged checkpoint",)), Outcome.FELL_BACK_SAYING),
        (Reply(2, "one"), Outcome.OTHER_VALUES),
        (Reply(7, "two"), Outcome.OTHER_VALUES),
        (Reply(2, "2", words=("missing keys were initialized",)), Outcome.OTHER_VALUES_SAYING),
        (Reply(), Outcome.BEGAN_ANEW),
        (Reply(error="ValueError: the file is truncated"), Outcome.FOUND),
        (Reply(error="ValueError: Error reading /run/step-2/d", directory="/run"), Outcome.FOUND),
        (Reply(error="KeyError: 'w'"), Outcome.DIED),
        (Reply(error="EOFError: \n  raise Invalid('corrupt')"), Outcome.DIED),  # a frame of a traceback
        (Reply(error="ValueError: fill_missing_reads", directory="/run"), Outcome.DIED),
        (Reply(crashed="ended with -6"), Outcome.CRASHED),
    ],
    ids=lambda value: value.value if isinstance(value, Outcome) else None,
)
def test_outcomes_are_told_apart(reply, outcome):
    assert classify(reply, EXPECTED, newest=2) is outcome


@pytest.fixture
def files(tmp_path):
    """Two files, of which the second has a million times the bytes of the first."""
    chance = random.Random(0)
    paths = [tmp_path / "small", tmp_path / "large"]
    for path, size in zip(paths, (1, 1_000_000), strict=True):
        path.write_bytes(chance.randbytes(size))
    return paths


def difference(before: bytes, after: bytes) -> list[int]:
    return [index for index, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]


@pytest.mark.parametrize("seed", range(3))
def test_accidents_do_what_they_say(files, seed):
    _, large = files
    before = large.read_bytes()

    said = accidents.flip_a_bit(files, random.Random(seed))
    flipped = large.read_bytes()
    (index,) = difference(before, flipped)
    assert (before[index] ^ flipped[index]).bit_count() == 1
    assert f"byte {index:,} of" in said

    said = accidents.zero_a_tail(files, random.Random(seed))
    begin = int(re.search(r"from byte ([\d,]+)", said)[1].replace(",", ""))
    assert large.read_bytes() == flipped[:begin] + bytes(len(before) - begin)

    said = accidents.truncate(files, random.Random(seed + 10))
    assert f"cut at byte {large.stat().st_size:,} of 1,000,000" in said

    said = accidents.remove_a_file(files, random.Random(seed))
    assert [path.exists() for path in files] == [path.name not in said for path in files]
    assert sum(path.exists() for path in files) == 1


def trials(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_damage_to_the_cheap_savers(tmp_path, capsys):
    log, table, shown = tmp_path / "log.jsonl", tmp_path / "table.md", tmp_path / "shown.png"
    arguments = ["--peers", "^(distrust|safetensors, new names|torch.save, new names)$", "--rounds", "2"]
    outputs = ["--log", str(log), "--markdown", str(table), "--picture", str(shown)]
    found = main([*arguments, "--accidents", "flipped|zeroed tail|truncated|missing file", *outputs])
    assert found == 0
    outcomes = {(trial["saver"], trial["accident"]): set() for trial in trials(log)}
    for trial in trials(log):
        outcomes[trial["saver"], trial["accident"]].add(trial["outcome"])

    for accident in ("flipped bit", "zeroed tail", "truncated file"):
        assert outcomes["distrust", accident] == {Outcome.FELL_BACK_SAYING.value}
    assert outcomes["safetensors, new names", "zeroed tail"] == {Outcome.OTHER_VALUES.value}
    assert outcomes["safetensors, new names", "truncated file"] == {Outcome.FOUND.value}
    assert outcomes["torch.save, new names", "truncated file"] == {Outcome.FOUND.value}
    for saver in ("safetensors, new names", "torch.save, new names"):  # struck in a header, some are found
        assert Outcome.OTHER_VALUES.value in outcomes[saver, "flipped bit"]
    assert {
        of for (_, accident), of_cell in outcomes.items() if accident == "missing file" for of in of_cell
    } == {Outcome.FELL_BACK.value}
    assert "| older one, said so 2 of 2 |" in table.read_text()
    assert "safetensors 0." in table.read_text()
    assert shown.read_bytes().startswith(b"\x89PNG")
    assert "every promise was kept" in capsys.readouterr().out


def test_kills_in_mid_save(tmp_path):
    log = tmp_path / "log.jsonl"
    arguments = ["--peers", "^distrust$|safetensors, same name", "--accidents", "SIGKILL", "--rounds", "1"]
    assert main([*arguments, "--log", str(log)]) == 0
    kills = trials(log)
    assert [kill["saver"] for kill in kills] == ["distrust", "safetensors, same name"]
    for kill in kills:
        assert re.fullmatch(r"killed \d+ ms into a save of about \d+ ms", kill["what"])
    assert kills[0]["outcome"] == Outcome.NOTHING_LOST.value


@pytest.mark.parametrize(
    ("subject", "outcome"), [(Safetensors(), Outcome.FOUND), (SafetensorsSame(), Outcome.ALL_LOST)]
)
def test_after_a_kill_it_is_asked_whether_anything_is_left(tmp_path, subject, outcome):
    """Half a file over the only one, and half a file beside a whole one."""
    expected = subject.expected(tmp_path, 1)
    with Warm(subject, fault=None) as warm:
        subject.write(tmp_path, 1, 3, lambda *_: None)
        assert after_kill(warm, subject, tmp_path, 1, 3, expected)[0] is Outcome.NOTHING_LOST
        path = subject.path(tmp_path, 3)
        os.truncate(path, path.stat().st_size // 2)
        assert after_kill(warm, subject, tmp_path, 1, 3, expected)[0] is outcome


def test_a_saver_that_takes_its_process_down(tmp_path):
    subject = Safetensors()
    subject.write(tmp_path, 1, 2, lambda *_: None)
    with Warm(subject, fault=None) as warm:
        assert warm.resume(tmp_path, 1).step == 2
        os.kill(warm.pid, signal.SIGKILL)
        assert warm.resume(tmp_path, 1).crashed.startswith("ended with -9")
        assert warm.resume(tmp_path, 1) == Reply(2, state.proof(state.make(2, 1)), directory=str(tmp_path))


def test_it_finds_ours_without_its_digests_and_finds_it_again(tmp_path, capsys):
    arguments = ["--peers", "^distrust$", "--fault", "digests", "--log", str(tmp_path / "log.jsonl")]
    assert main([*arguments, "--accidents", "flipped|zeroed tail"]) == 1
    printed = capsys.readouterr().out
    assert "COUNTEREXAMPLE: distrust, flipped bit" in printed
    assert "other values, unnoticed" in printed
    (first,) = trials(tmp_path / "log.jsonl")

    seed, case = re.search(r"--seed (\d+) --case (\d+)", printed).groups()
    assert main([*arguments, "--seed", seed, "--case", case]) == 1
    assert trials(tmp_path / "log.jsonl") == [first]
    assert main(["--peers", "^distrust$", "--seed", seed, "--case", case]) == 0


def test_who_is_not_installed_is_skipped_and_said(monkeypatch, capsys):
    monkeypatch.setattr(all_subjects, "_installed", lambda module: module not in {"torch", "safetensors"})
    tried = ["--peers", "torch.save, new|safetensors, new|^distrust$", "--accidents", "truncated"]
    assert main([*tried, "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "torch.save, new names: skipped, for there is no torch here" in printed
    assert "safetensors, new names: skipped, for there is no safetensors here" in printed
    assert "1  truncated file, distrust: older one, said so" in printed


def test_every_cell_has_a_number_of_its_own():
    names = [(cell.subject.name, cell.accident.name) for cell in CELLS]
    assert len(set(names)) == len(names)
    assert {subject.name for subject in all_subjects.SUBJECTS} == {saver for saver, _ in names}
