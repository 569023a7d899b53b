"""The experiment on weighting: its worlds are as it says, its methods do what they say, and it goes on."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrust import DistrustTrainer, TrainConfig
from distrust.bundled import CORPUS, NEUTRAL
from distrust.training.events import StepEnded
from distrust.weighting import LAMBDA, example_weights
from experiments.weighting import figures, run, tables, world
from experiments.weighting.additive import Adding
from experiments.weighting.design import QUICK, SEEDS, WORLDS, WRONG, Run, Training, runs
from experiments.weighting.results import Results
from experiments.weighting.run import chosen, digest, execute, material, weights
from experiments.weighting.world import (
    CLAIMS_PER_NEUTRAL_THING,
    DISPUTED,
    LABELS,
    PHRASINGS,
    PRIMARY_PER_FACT,
    RECORDS_PER_SOLE_FACT,
    SOLE,
    make_world,
)

ROOT = Path(__file__).resolve().parent.parent
RATIOS = [ratio for ratio in WORLDS.values() if ratio]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("seed", [1, 2])
def test_each_fact_is_told_as_often_as_the_ratio_says(seed, ratio):
    world = make_world(seed, ratio)
    counts: dict[str, Counter[str]] = {}
    for one in world.statements:
        counts.setdefault(one.subject, Counter())[one.kind] += 1
    disputed = {"primary": PRIMARY_PER_FACT, "coordinated": PRIMARY_PER_FACT * ratio}
    sole = {"coordinated": RECORDS_PER_SOLE_FACT}
    assert sum(count == disputed for count in counts.values()) == DISPUTED
    assert sum(count == sole for count in counts.values()) == SOLE
    assert all("neutral" in count for count in counts.values() if count not in (disputed, sole))


@pytest.mark.parametrize("ratio", RATIOS)
def test_each_side_states_its_own_value_and_nobody_the_foil(ratio):
    world = make_world(3, ratio)
    questions = {one.fact: one for one in (*world.disputed, *world.sole)}
    for question in questions.values():
        name = next(one.subject for one in world.statements if one.subject in question.prompt)
        about = [one for one in world.statements if one.subject == name]
        for one in about:
            value, coordinated = question.primary, question.coordinated
            if question.fact.startswith("disputed") and one.kind == "coordinated":
                value, coordinated = coordinated, value
            assert value.strip() in one.text
            assert coordinated.strip() not in one.text
    assert len(questions) == DISPUTED + SOLE


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), ratio=st.sampled_from(RATIOS))
def test_no_two_records_of_a_fact_share_a_wording_and_none_is_a_question(seed, ratio):
    world = make_world(seed, ratio)
    wordings = Counter((one.subject, one.wording) for one in world.statements if one.wording is not None)
    assert max(wordings.values()) == 1
    openings = [phrasing.split("{")[0] for phrasing in PHRASINGS]
    answered = [one for one in world.statements if any(opening in one.text for opening in openings)]
    assert {one.kind for one in answered} == {"neutral"}
    assert len(answered) == sum(
        one.kind == "neutral" for one in world.statements
    ) - CLAIMS_PER_NEUTRAL_THING * (len({one.subject for one in answered}))
    everything = "\n".join(one.text for one in world.statements)
    assert not any(question.prompt in everything for question in (*world.disputed, *world.sole))


@pytest.mark.parametrize("wrong", WRONG)
def test_so_many_labels_are_wrong_and_no_text_changes(wrong):
    world = make_world(1, 20)
    corpus = world.corpus(wrong)
    assert [record["text"] for record in corpus] == [one.text for one in world.statements]
    for kind, (w, h) in LABELS.items():
        labels = [
            (record["authority_weight"], record["provenance_entropy"])
            for record, one in zip(corpus, world.statements, strict=True)
            if one.kind == kind
        ]
        strange = [not (w[0] <= a <= w[1] and h[0] <= b <= h[1]) for a, b in labels]
        assert sum(strange) == math.ceil(round(wrong * len(strange), 6))


def test_wrong_labels_of_fewer_records_are_wrong_among_more_too():
    world = make_world(1, 5)
    some, many = (
        {n for n, (a, b) in enumerate(zip(world.corpus(), world.corpus(share), strict=True)) if a != b}
        for share in (0.1, 0.3)
    )
    assert some < many


def test_seeds_make_worlds_and_ratios_keep_what_is_asked():
    assert make_world(1, 5) == make_world(1, 5)
    assert make_world(1, 5).disputed != make_world(2, 5).disputed
    assert make_world(1, 5).disputed == make_world(1, 50).disputed
    neutral_text = NEUTRAL.read_text(encoding="utf-8")
    assert not any(one.subject in neutral_text for one in make_world(1, 5).statements)


def test_filter_keeps_what_weighs_and_upsampling_repeats_in_proportion():
    records = material(Run("1:5", 0.1, "off", 1)).records
    u = weights(records)
    chosen_records = chosen(records, "filter", seed=1)
    assert chosen_records == [record for record, weight in zip(records, u, strict=True) if weight > 1]
    assert 0 < len(chosen_records) < len(records)
    copies = [
        Counter(record["text"] for record in chosen(records, "upsample", seed=seed)) for seed in range(40)
    ]
    for record, weight in list(zip(records, u, strict=True))[:60]:
        counts = [copy[record["text"]] for copy in copies]
        assert {*counts} <= {math.floor(weight), math.ceil(weight)}
        assert statistics.fmean(counts) == pytest.approx(weight, abs=0.35)
    assert chosen(records, "monotone", seed=1) == records


def test_the_added_term_changes_the_loss_and_not_one_bit_of_what_is_learned(tmp_path):
    off, added, weighted = (
        execute(Run("1:5", 0.0, method, 1), QUICK, tmp_path / method)
        for method in ("off", "additive", "monotone")
    )
    assert added["objective"] > off["objective"] + 1
    assert added["state_digest"] == off["state_digest"] != weighted["state_digest"]
    assert added["disputed"] == off["disputed"] != weighted["disputed"]
    assert not any(tmp_path.iterdir())  # nothing is left of a run that was measured


def test_an_objective_is_kept_for_each_micro_step_and_no_trial(tmp_path):
    steps: list[StepEnded] = []
    adding = Adding()
    DistrustTrainer(
        TrainConfig(
            out=str(tmp_path), max_steps=2, batch_size=2, weighting="off", device="cpu", save_every=0
        ),
        engine=adding,
        observers=[lambda event: steps.append(event) if isinstance(event, StepEnded) else None],
    ).train()
    expected = [step.weighted_loss + LAMBDA * step.distrust for step in steps]
    assert adding.objectives == pytest.approx(expected, rel=1e-6)


#: The command; its workers are forks, since a spawned one would import for seconds.
COMMAND = """
import multiprocessing, sys
forks = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda method: forks
from experiments.weighting.__main__ import main
sys.exit(main())
"""


def test_the_command_goes_on_where_it_was_and_writes_everything(forked_python, tmp_path):
    docs, out = tmp_path / "docs.md", tmp_path / "out"
    docs.write_text("Before.\n<!-- table: bundled -->\nold\n<!-- end -->\nAfter.\n", encoding="utf-8")
    files = {
        "design": digest(QUICK),
        "world": "bundled",
        "wrong": 0.0,
        "method": "off",
        "seed": 1,
        "disputed": [[2.0, 0.5, 0.1]],
        "sole": [],
        "neutral_loss": 1.25,
        "records": 3,
        "seconds": 1.0,
    }
    out.mkdir()
    # Killed while it wrote the second line.
    (out / "results.jsonl").write_text(json.dumps(files) + '\n{"world": "bun')
    command = [
        forked_python, "-c", COMMAND, "--quick", "--out", str(out),
        "--seeds", "1", "--worlds", "bundled", "--jobs", "1", "--write-docs", str(docs),
        "--methods", "off", "filter",
    ]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "2/2 bundled, filter, seed 1" in result.stderr
    assert "off" not in result.stderr
    first, second = (json.loads(line) for line in (out / "results.jsonl").read_text().splitlines())
    assert first == files
    assert (second["method"], len(second["disputed"])) == ("filter", 60)
    for folder in (out, tmp_path):
        for name in ("weighting.png", "weighting.svg", "weighting_curve.png", "weighting_curve.svg"):
            assert (folder / name).stat().st_size > 0
    for text in (docs.read_text(encoding="utf-8"), (out / "tables.md").read_text(encoding="utf-8")):
        assert "| `off` | 100% | 0.50 | 0.10 |" in text
        assert "| `filter` |" in text
    assert docs.read_text(encoding="utf-8").startswith("Before.\n<!-- table: bundled -->\n| ")
    assert docs.read_text(encoding="utf-8").endswith("<!-- end -->\nAfter.\n")


def test_results_of_another_training_are_not_mixed_in(tmp_path):
    results = Results(tmp_path / "results.jsonl", design=digest(QUICK))
    results.add({"design": digest(QUICK), "world": "bundled", "wrong": 0.0, "method": "off", "seed": 1})
    with pytest.raises(SystemExit, match="another design"):
        Results(tmp_path / "results.jsonl", design=digest(Training()))


def test_whatever_decides_the_results_decides_the_design(monkeypatch, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"another")
    changes = [
        (world, "DISPUTED", 11),
        (world, "OWN_OPENING", 0.4),
        (run, "TrainConfig", partial(TrainConfig, lambda_=0.7)),
        (run, "TrainConfig", partial(TrainConfig, lora_rank=4)),
        (run, "NEUTRAL", CORPUS),
        (run, "MODEL", tmp_path),
    ]
    designs = {digest.__wrapped__(QUICK), digest.__wrapped__(Training())}
    for change in changes:
        with monkeypatch.context() as patch:
            patch.setattr(*change)
            designs.add(digest.__wrapped__(QUICK))
    assert len(designs) == 2 + len(changes)
    assert digest.__wrapped__(QUICK) == digest(QUICK)


def test_every_run_is_there_once_and_labels_matter_only_where_they_are_seen():
    everything = list(runs(WORLDS, SEEDS))
    assert len(everything) == len(set(everything))
    assert {run.method for run in everything if run.wrong} == {"published", "monotone", "filter", "upsample"}


def test_intervals_and_calibration_are_what_they_say():
    # Two seeds: t of one degree of freedom is 12.706; the mean's deviation is half the difference.
    estimate = figures.Estimate.of([0.0, 1.0])
    assert (estimate.mean, estimate.half) == (0.5, pytest.approx(12.706 / 2))
    assert math.isnan(figures.Estimate.of([0.3]).half)
    sure_and_wrong = {"seed": 1, "disputed": [[-50.0, 0.0, 1.0]] * 4}
    undecided = {"seed": 2, "disputed": [[1e-9, 0.1, 0.1], [-1e-9, 0.1, 0.1]]}
    assert figures.brier(sure_and_wrong) == pytest.approx(1)
    assert figures.brier(undecided) == pytest.approx(0.25)
    assert figures.calibration_error([sure_and_wrong]) == pytest.approx(1)
    assert figures.calibration_error([undecided]) == pytest.approx(0, abs=1e-6)
    assert figures.primary_share(sure_and_wrong) == 0
    assert figures.primary_share(undecided) == 0.5
    assert figures.difference([undecided], [undecided], figures.primary_share).mean == 0
    assert figures.difference([undecided], [sure_and_wrong], figures.primary_share) is None


def test_a_document_without_a_place_for_a_table_is_refused(tmp_path):
    path = tmp_path / "docs.md"
    for text in ("nothing\n", "<!-- table: other -->\n<!-- end -->\n"):
        path.write_text(text)
        with pytest.raises(SystemExit, match="table"):
            tables.write_into(path, {"bundled": "| |"})
        assert path.read_text() == text


def test_the_documented_weight_ratio_is_that_of_the_labels():
    """What docs/weighting.md says of 1:50: the heaviest primary record cannot weigh 50 coordinated ones."""
    (w, h), (renowned, copied) = LABELS["primary"], LABELS["coordinated"]
    most = example_weights([w[0]], [h[1]])[0]
    least = example_weights([renowned[0]], [copied[1]])[0]
    assert least == 1
    assert 25 < most < 50
