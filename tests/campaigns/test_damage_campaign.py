"""The damage campaign in short, and that it finds every planted fault."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from campaigns.corruptions import kinds
from campaigns.damage import Round, main
from distrust.checkpoint import CheckpointFile, header, storage, verified_read
from distrust.checkpoint.retainer import Retainer
from distrust.errors import WarningCollector

AGAIN = re.compile(r"again: python -m campaigns\.damage (--seed \d+ --case \d+)")


def do_nothing(*_: Any, **__: Any) -> None: ...


def digest_in_file(raw: bytes) -> str:
    return bytes(raw[header.DIGEST_SLICE]).decode("latin-1")


def trust_header(patch: pytest.MonkeyPatch) -> None:
    """Skip both checks: of the digest, and that a writer would encode the same."""
    patch.setattr(header, "header_digest", digest_in_file)
    patch.setattr(header.Header, "require_intact", do_nothing)


def count_damaged(patch: pytest.MonkeyPatch) -> None:
    def verify(self: Retainer, file: CheckpointFile) -> None:
        self._state.intact.add(file.identity)

    patch.setattr(Retainer, "_verify", verify)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "data is not compared": (
        lambda patch: patch.setattr(verified_read, "check_digest", do_nothing),
        "validate does not find it",
    ),
    "the header is trusted": (trust_header, "validate does not find it"),
    "the file's size is not compared": (
        lambda patch: patch.setattr(header, "_fits_data", lambda *_: True),
        "appended: validate does not find it",
    ),
    "names are not compared": (
        lambda patch: patch.setattr(CheckpointFile, "require_name", do_nothing),
        "validate does not find it",
    ),
    "no warning": (
        lambda patch: patch.setattr(WarningCollector, "append", do_nothing),
        "load_latest warns with []",
    ),
    "damaged files count": (count_damaged, r"a clean-up removed [10]"),
    "nothing is ever removed": (
        lambda patch: patch.setattr(storage, "remove", do_nothing),
        "prune --damaged leaves",
    ),
}


@pytest.fixture(scope="module")
def round_(tmp_path_factory) -> Round:
    return Round(tmp_path_factory.mktemp("round") / "0", "1/0")


def test_some_of_every_kind_are_found(round_, tmp_path, capsys):
    assert main(["--cases", "48", "--directory", str(tmp_path), "--json", str(tmp_path / "counts")]) == 0
    figures = json.loads((tmp_path / "counts").read_text())
    assert figures["counterexample"] is None
    for kind in kinds(round_.files):
        assert figures["counts"][kind.name] > 0
    assert "every invariant held" in capsys.readouterr().out


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_product_is_found_and_found_again(tmp_path, capsys, monkeypatch, fault):
    plant, finding = FAULTS[fault]
    directory = ["--directory", str(tmp_path)]
    with monkeypatch.context() as patch:
        plant(patch)
        assert main(["--cases", "500", "--seed", "2", *directory]) == 1
        output = capsys.readouterr().out
        assert finding in output
        again = AGAIN.search(output)[1].split()
        assert main([*again, *directory]) == 1
        assert finding in capsys.readouterr().out
    assert main([*again, *directory]) == 0  # the finding was the fault


def test_the_same_seed_gives_the_same_cases_and_another_one_other_files(round_, tmp_path):
    again, another = Round(tmp_path / "again", "1/0"), Round(tmp_path / "other", "2/0")
    assert again.files == round_.files
    for number in range(0, round_.size, 997):
        (kind, index), (same_kind, same_index) = round_.locate(number), again.locate(number)
        assert kind.make(index) == same_kind.make(same_index)
    assert another.files.newer != round_.files.newer
    assert another.size == round_.size  # so that the number of a case determines its round


def test_every_damage_is_a_case_once(round_):
    cases = [(kind.name, index) for kind, index in map(round_.locate, range(round_.size))]
    every = kinds(round_.files)
    assert len(set(cases)) == round_.size
    assert set(cases) == {(kind.name, index) for kind in every for index in range(kind.size)}
    assert {name for name, _ in cases[: len(every)]} == {kind.name for kind in every}
    with pytest.raises(IndexError):
        round_.locate(round_.size)


def test_every_bit_is_flipped_and_no_other(round_):
    newer = round_.files.newer
    (flips,) = (kind for kind in kinds(round_.files) if kind.name == "bits flipped")
    assert flips.size == 8 * len(newer)
    for number in range(0, flips.size, 101):
        difference = int.from_bytes(newer, "little") ^ int.from_bytes(flips.make(number).content, "little")
        assert difference == 1 << number


def test_after_the_last_damage_it_starts_again_with_another_content(round_, tmp_path, capsys):
    assert main(["--case", str(round_.size + 7), "--directory", str(tmp_path)]) == 0
    assert "1  cleaned up, saved beside it" in capsys.readouterr().out
