"""The campaign of the peers: it distinguishes all outcomes; in short form, on the cheap savers."""

from __future__ import annotations

import json
import os
import random
import re
import signal

import pytest

from campaigns.peers import accidents, all_subjects
from campaigns.peers.__main__ import main
from campaigns.peers.outcomes import Outcome, Reply, classify
from campaigns.peers.processes import WarmProcess
from campaigns.peers.subjects import make_state, proof_of
from campaigns.peers.trials import CELLS, resume_after_kill

EXPECTED = {1: "one", 2: "two", 3: "three"}


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (Reply(2, "two"), Outcome.NOTHING_LOST),
        (Reply(3, "three"), Outcome.NOTHING_LOST),  # not reported yet, and intact
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
def test_outcomes_are_distinguished(reply, outcome):
    assert classify(reply, EXPECTED, newest=2) is outcome


@pytest.fixture
def files(tmp_path):
    """Two files, of which the second has a million times the bytes of the first."""
    rng = random.Random(0)
    paths = [tmp_path / "small", tmp_path / "large"]
    for path, size in zip(paths, (1, 1_000_000), strict=True):
        path.write_bytes(rng.randbytes(size))
    return paths


def difference(old: bytes, new: bytes) -> list[int]:
    return [index for index, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]


@pytest.mark.parametrize("seed", range(3))
def test_accidents_do_what_they_say(files, seed):
    _, large = files
    original = large.read_bytes()

    description = accidents.flip_a_bit(files, random.Random(seed))
    flipped = large.read_bytes()
    (index,) = difference(original, flipped)
    assert (original[index] ^ flipped[index]).bit_count() == 1
    assert f"byte {index:,} of" in description

    description = accidents.zero_a_tail(files, random.Random(seed))
    begin = int(re.search(r"from byte ([\d,]+)", description)[1].replace(",", ""))
    assert large.read_bytes() == flipped[:begin] + bytes(len(original) - begin)

    description = accidents.truncate(files, random.Random(seed + 10))
    assert f"cut at byte {large.stat().st_size:,} of 1,000,000" in description

    description = accidents.remove_a_file(files, random.Random(seed))
    assert [path.exists() for path in files] == [path.name not in description for path in files]
    assert sum(path.exists() for path in files) == 1


def trials(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_damage_to_the_cheap_savers(tmp_path, capsys):
    log, table, picture = tmp_path / "log.jsonl", tmp_path / "table.md", tmp_path / "picture.png"
    arguments = ["--peers", "^(distrust|safetensors, new names|torch.save, new names)$", "--rounds", "1"]
    outputs = ["--log", str(log), "--markdown", str(table), "--picture", str(picture)]
    accident_names = "flipped|zeroed tail|truncated|missing file"
    assert main([*arguments, "--accidents", accident_names, *outputs]) == 0
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
    assert "| older one, said so 1 of 1 |" in table.read_text()
    assert "safetensors 0." in table.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "every invariant held" in capsys.readouterr().out


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
    ("names", "outcome"), [("new names", Outcome.FOUND), ("same name", Outcome.ALL_LOST)]
)
def test_after_a_kill_a_second_attempt_shows_whether_anything_is_left(tmp_path, names, outcome):
    """Half a file over the only one, and half a file beside an intact one."""
    subject = all_subjects.find_subject(f"safetensors, {names}")
    expected = subject.expected_proofs(tmp_path, 1)
    with WarmProcess(subject, fault=None) as warm:
        subject.write(tmp_path, 1, 3, lambda *_: None)
        assert resume_after_kill(warm, subject, tmp_path, 1, 3, expected)[0] is Outcome.NOTHING_LOST
        path = subject.path(tmp_path, 3)
        os.truncate(path, path.stat().st_size // 2)
        assert resume_after_kill(warm, subject, tmp_path, 1, 3, expected)[0] is outcome


def test_a_saver_that_takes_its_process_down(tmp_path):
    subject = all_subjects.find_subject("safetensors, new names")
    subject.write(tmp_path, 1, 2, lambda *_: None)
    with WarmProcess(subject, fault=None) as warm:
        assert warm.resume(tmp_path, 1).step == 2
        os.kill(warm.pid, signal.SIGKILL)
        assert warm.resume(tmp_path, 1).crashed.startswith("ended with -9")
        assert warm.resume(tmp_path, 1) == Reply(2, proof_of(make_state(2, 1)), directory=str(tmp_path))


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


def test_a_saver_that_is_not_installed_is_reported_as_skipped(monkeypatch, capsys):
    monkeypatch.setattr(all_subjects, "_is_installed", lambda module: module not in {"torch", "safetensors"})
    arguments = ["--peers", "torch.save, new|safetensors, new|^distrust$", "--accidents", "truncated"]
    assert main([*arguments, "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "torch.save, new names: skipped, torch not installed" in printed
    assert "safetensors, new names: skipped, safetensors not installed" in printed
    assert "1  truncated file, distrust: older one, said so" in printed


def test_every_cell_has_a_number_of_its_own():
    names = [(cell.subject.name, cell.accident.name) for cell in CELLS]
    assert len(set(names)) == len(names)
    assert {subject.name for subject in all_subjects.SUBJECTS} == {saver for saver, _ in names}
