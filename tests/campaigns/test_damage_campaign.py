"""The damage campaign in short, and that it finds what it is there to find."""

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


def nothing(*_: Any, **__: Any) -> None: ...


def own_digest_of_the_file(raw: bytes) -> str:
    return bytes(raw[header.DIGEST_SLICE]).decode("latin-1")


def trusts_the_header(patch: pytest.MonkeyPatch) -> None:
    """Both proofs: that it is the one that was written, and that it is one that a writer makes."""
    patch.setattr(header, "header_digest", own_digest_of_the_file)
    patch.setattr(header.Header, "require_intact", nothing)


def counts_damaged_ones(patch: pytest.MonkeyPatch) -> None:
    def verify(self: Retainer, file: CheckpointFile, warnings: object) -> None:
        self._state.intact.add(file.identity)

    patch.setattr(Retainer, "_verify", verify)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "data is not compared": (
        lambda patch: patch.setattr(verified_read, "check_digest", nothing),
        "validate does not find it",
    ),
    "the header is trusted": (trusts_the_header, "validate does not find it"),
    "the file's size is not compared": (
        lambda patch: patch.setattr(header, "_fits_data", lambda *_: True),
        "appended: validate does not find it",
    ),
    "names are not compared": (
        lambda patch: patch.setattr(CheckpointFile, "require_name", nothing),
        "validate does not find it",
    ),
    "nobody is warned": (
        lambda patch: patch.setattr(WarningCollector, "append", nothing),
        "load_latest warns with []",
    ),
    "damaged ones count": (counts_damaged_ones, r"a clean-up removed [10]"),
    "nothing is ever removed": (
        lambda patch: patch.setattr(storage, "remove", nothing),
        "prune --damaged leaves",
    ),
}


@pytest.fixture(scope="module")
def round_(tmp_path_factory) -> Round:
    return Round(tmp_path_factory.mktemp("round") / "0", "1/0")


def test_some_of_every_kind_are_found(round_, tmp_path, capsys):
    assert main(["--cases", "48", "--directory", str(tmp_path), "--json", str(tmp_path / "counts")]) == 0
    found = json.loads((tmp_path / "counts").read_text())
    assert found["counterexample"] is None
    for kind in kinds(round_.files):
        assert found["counts"][kind.name] > 0
    assert "every promise was kept" in capsys.readouterr().out


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_product_is_found_and_found_again(tmp_path, capsys, monkeypatch, fault):
    breaks, promise = FAULTS[fault]
    place = ["--directory", str(tmp_path)]
    with monkeypatch.context() as patch:
        breaks(patch)
        assert main(["--cases", "500", "--seed", "2", *place]) == 1
        said = capsys.readouterr().out
        assert promise in said
        again = AGAIN.search(said)[1].split()
        assert main([*again, *place]) == 1
        assert promise in capsys.readouterr().out
    assert main([*again, *place]) == 0  # it is the fault that was found


def test_the_same_seed_gives_the_same_cases_and_another_one_other_files(round_, tmp_path):
    again, other = Round(tmp_path / "again", "1/0"), Round(tmp_path / "other", "2/0")
    assert again.files == round_.files
    for number in range(0, round_.size, 997):
        (kind, place), (same, equal) = round_.place(number), again.place(number)
        assert kind.make(place) == same.make(equal)
    assert other.files.good != round_.files.good
    assert other.size == round_.size  # so that a case's number tells its round


def test_every_injury_is_a_case_once(round_):
    places = [(kind.name, place) for kind, place in map(round_.place, range(round_.size))]
    every = kinds(round_.files)
    assert len(set(places)) == round_.size
    assert set(places) == {(kind.name, place) for kind in every for place in range(kind.size)}
    assert {name for name, _ in places[: len(every)]} == {kind.name for kind in every}
    with pytest.raises(IndexError):
        round_.place(round_.size)


def test_every_bit_is_flipped_and_no_other(round_):
    good = round_.files.good
    (flips,) = (kind for kind in kinds(round_.files) if kind.name == "bits flipped")
    assert flips.size == 8 * len(good)
    for number in range(0, flips.size, 101):
        difference = int.from_bytes(good, "little") ^ int.from_bytes(flips.make(number).content, "little")
        assert difference == 1 << number


def test_after_the_last_injury_it_begins_again_with_another_content(round_, tmp_path, capsys):
    assert main(["--case", str(round_.size + 7), "--directory", str(tmp_path)]) == 0
    assert "1  cleaned up, saved beside it" in capsys.readouterr().out
