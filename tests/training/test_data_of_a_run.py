"""Resumes are exact for every kind of data, with or without the cache."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distrust import CheckpointManager, DistrustTrainer, TrainConfig
from distrust.data import Cache, Columns, Limits, RecordReader, check_records, open_source
from distrust.errors import ConfigError, DataError, DistrustWarning, ResumeRefused
from distrust.option_values import EXAMPLES
from distrust.testing.models import write_records
from distrust.testing.toy_engine import VOCABULARY, ToyEngine
from distrust.training.data_sources import CheckedData, read_sources
from distrust.training.events import Evaluated, Preparing, RunStarted, StepEnded
from distrust.training.prepare_data import prepare_data


def engine():
    """The toy engine with a tokenizer of transformers, whose tokens can be cached."""
    words = ["<unk>", "<eos>", "ore", "salt", "the", "melts", "at", "9"]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    toy = ToyEngine()
    toy.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    assert len(words) <= VOCABULARY
    return toy


class Shifted:
    """A tokenizer of bytes that adds ``shift`` to each."""

    bos_token_id = pad_token_id = chat_template = None
    eos_token_id = 400

    def __init__(self, shift: int) -> None:
        self.shift = shift

    def encode(self, text, *, add_special_tokens):
        return [byte + self.shift for byte in text.encode()]


@pytest.fixture
def other(tmp_path):
    return write_records(tmp_path / "other.jsonl", 5, seed=4)


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def steps_of(events):
    return [event.step for event in events if isinstance(event, StepEnded)]


@pytest.mark.parametrize("cached", [True, False])
def test_resume_of_mixed_sources_is_exact(run, data, other, tmp_path, cached):
    cache = tmp_path / "cache"
    options = {
        "data": (str(data), str(other)),
        "mix": (0.25, 0.75),
        "eval_fraction": 0.2,
        "eval_every": 4,
        "cache_dir": str(cache),
    }
    alone, _ = run(tmp_path / "alone", engine=engine(), **options)
    engines, tokenized = [], []
    for stop in (2, 3, 7, None):
        ended, events = run(tmp_path / "stopped", stop_after=stop, engine=engine(), **options)
        engines += steps_of(events)
        tokenized.append(any(isinstance(event, Preparing) and "tokenizing" in event.task for event in events))
        if not cached:
            shutil.rmtree(cache)
    assert engines == list(range(1, 10))
    assert tokenized == ([False] * 4 if cached else [False, True, True, True])
    assert ended.state_digest == alone.state_digest


def test_cached_tokens_are_those_of_the_tokenizer_and_the_length(data, tmp_path):
    reader = RecordReader((open_source(str(data), Columns()),), Columns(), None, None)
    checked = CheckedData(reader, check_records(reader), Cache(tmp_path), lambda *_: None)

    def tokenize(shift, max_length):
        limits, today = Limits(max_length=max_length), date(2026, 1, 2)
        return checked.tokenize(Shifted(shift), tokenizer_digest=str(shift), limits=limits, today=today)

    for shift, max_length in ((0, 9), (100, 9), (0, 5), (0, 9)):
        corpus = tokenize(shift, max_length)
        assert corpus.lengths.max() == max_length
        assert min(corpus.input_ids) >= shift + ord(" ")


def test_a_lower_limit_of_a_record_holds_for_data_that_was_checked_before(data, tmp_path):
    options = {"data": str(data), "cache_dir": str(tmp_path), "weighting": "monotone"}
    read_sources(TrainConfig(**options))
    for _ in range(2):
        with pytest.raises(DataError, match="takes more than 20 bytes"):
            read_sources(TrainConfig(**options, max_record_bytes=20))
    (entry,) = (tmp_path / "checked-3").iterdir()
    read_sources(TrainConfig(**options, max_record_bytes=1 << 20))
    assert len(list((tmp_path / "checked-3").iterdir())) == 2
    reader = RecordReader((open_source(str(data), Columns()),), Columns(), None, None)
    assert entry.stem == reader.key  # entries of earlier versions stay valid


def test_shares_determine_the_trained_examples(data, other):
    config = TrainConfig(data=(str(data), str(other)), mix=(1.0, 3.0), batch_size=4)
    toy = engine()
    plan = prepare_data(config, read_sources(config), toy.tokenizer, context_length=None)
    epoch = [batch for step in range(1, 5) for batch in plan.batches.step(step)]  # 4 × 4 = 11 + 5
    sampled = [example for batch in epoch for example in batch.examples]
    assert len(sampled) == 16
    assert sum(example >= 11 for example in sampled) == 12
    # Normalized over the sampled tokens: over many epochs the mean weight is 1.
    many = [batch for step in range(1, 4 * 55 + 1) for batch in plan.batches.step(step)]
    total = sum(batch.weights.sum(dtype=float) for batch in many)
    assert total == pytest.approx(sum(batch.tokens for batch in many), rel=1e-4)


def test_sources_without_mix_are_concatenated(run, data, other, tmp_path):
    joined = tmp_path / "joined.jsonl"
    joined.write_text(data.read_text() + other.read_text())
    _, one = run(tmp_path / "one", data=str(joined))
    _, two = run(tmp_path / "two", data=(str(data), str(other)))
    losses = [[event.loss for event in events if isinstance(event, StepEnded)] for events in (one, two)]
    assert losses[0] == losses[1]


def test_file_format_does_not_change_the_result(run, alone, data, tmp_path):
    run(tmp_path / "moved", stop_after=4)
    table = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_of(data)), table)
    ended, _ = run(tmp_path / "moved", data=str(table))
    assert ended.state_digest == alone.state_digest


def test_changed_sources_or_shares_are_refused(run, data, other, tmp_path):
    both = (str(data), str(other))
    run(tmp_path / "run", stop_after=3, data=both, mix=(1.0, 1.0))
    with pytest.raises(ResumeRefused, match=r"--mix was 1\.0 1\.0, is 1\.0 2\.0"):
        run(tmp_path / "run", data=both, mix=(1.0, 2.0))
    with pytest.raises(ResumeRefused, match=f"--data {other} {data}: its content is not that of the run"):
        run(tmp_path / "run", data=both[::-1], mix=(1.0, 1.0))
    # A run older than the option used its default.
    run(tmp_path / "plain", stop_after=3)
    with pytest.raises(ResumeRefused, match=r"--eval-fraction was 0\.0, is 0\.3"):
        run(tmp_path / "plain", eval_fraction=0.3)


def test_eval_fraction_holds_out_examples(run, data, tmp_path):
    _, events = run(tmp_path, eval_fraction=0.3, eval_every=3)
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert started.examples == 8  # 3 of 11 are held out
    assert [event.step for event in events if isinstance(event, Evaluated)] == [3, 6, 9]


def test_eval_split(run, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_records(folder / "train.jsonl", 11)
    write_records(folder / "test.jsonl", 4, seed=3)
    _, events = run(tmp_path / "run", data=str(folder), eval_split="test", eval_every=9)
    _, plain = run(
        tmp_path / "plain",
        data=str(folder / "train.jsonl"),
        eval_data=str(folder / "test.jsonl"),
        eval_every=9,
    )
    losses = [[event.loss for event in each if isinstance(event, Evaluated)] for each in (events, plain)]
    assert losses[0] == losses[1] != []


def test_weighting_off_needs_no_provenance(run, tmp_path):
    data = tmp_path / "plain.jsonl"
    data.write_text('{"text": "ore melts"}\n{"text": "salt melts at 9"}\n')
    with pytest.raises(DataError, match="authority_weight: missing"):
        run(tmp_path / "run", data=str(data), weighting="monotone")
    assert run(tmp_path / "run", data=str(data), weighting="off")[0].step == 9


def test_the_data_decides_whether_it_is_weighed(run, data, tmp_path):
    """By provenance if all records state it, or have defaults; not if none does; else the usual error."""
    stated = rows_of(data)
    plain = [{"text": row["text"]} for row in stated]
    half = [{**row, "authority_weight": 0.2} for row in plain]
    defaults = {"default_authority_weight": 0.5, "default_provenance_entropy": 2.0}
    cases = (
        (stated, {}, "monotone"),
        (plain, {}, "off"),
        (plain, defaults, "monotone"),
        (stated + plain, defaults, "monotone"),
    )
    for number, (rows, options, weighting) in enumerate(cases):
        folders = tmp_path / f"{number}-auto", tmp_path / f"{number}-named"
        run(folders[0], examples=rows, stop_after=4, **options)  # and resumed
        ended, events = run(folders[0], examples=rows, **options)
        assert steps_of(events)[0] == 5
        named, _ = run(folders[1], examples=rows, weighting=weighting, **options)
        assert ended.state_digest == named.state_digest
        # A run that is repeated without the option is the same run.
        assert run(folders[1], examples=rows, **options)[0].already_finished
        (started,) = (event for event in events if isinstance(event, RunStarted))
        assert started.weighting == weighting
        assert any("weighting by provenance: off" in note for note in started.notes) == (weighting == "off")
    for rows, field in ((half, "provenance_entropy"), (stated + plain, "authority_weight")):
        with pytest.raises(DataError, match=f"{field}: missing"):
            run(tmp_path / "some", examples=rows)
    # A run keeps what it began with, also where the data alone would decide otherwise.
    off, _ = run(tmp_path / "off", data=str(data), weighting="off")
    run(tmp_path / "kept", data=str(data), weighting="off", stop_after=4)
    assert run(tmp_path / "kept", data=str(data))[0].state_digest == off.state_digest
    with pytest.raises(ResumeRefused, match="--weighting was off, is monotone"):
        run(tmp_path / "off", data=str(data), weighting="monotone")


def test_columns_are_reported_once(run, data, tmp_path):
    rows = [{"id": 1, "autority_weight": 0.5, "text": row["text"], "question": None} for row in rows_of(data)]
    with pytest.warns(DistrustWarning) as warnings:
        _, events = run(tmp_path / "run", examples=rows)
    (started,) = (event for event in events if isinstance(event, RunStarted))
    assert started.notes[0] == 'columns: "text"; ignored: "id", "autority_weight", "question"'
    assert [str(warning.message) for warning in warnings] == [
        '"autority_weight" is ignored; if it is the authority_weight, give --authority-weight-column '
        '"autority_weight"'
    ]
    for options, problem in (
        ({"weight_column": "wieght"}, '--weight-column wieght: no record has this column (there is "text"'),
        ({"prompt_column": ("text", "input"), "completion_column": "id"}, "id: a number"),
        ({"text_column": "body"}, 'examples[0]: no body; correct --text-column (there is "id"'),
        ({"prompt_column": ("id", "input"), "completion_column": "text"}, "--prompt-column input: no record"),
    ):
        named = [{**row, "id": "a"} if "id" in options.get("prompt_column", ()) else row for row in rows]
        with pytest.raises((DataError, ConfigError)) as caught:
            run(tmp_path / "wrong", examples=named, **options)
        (line,) = str(caught.value).splitlines()
        assert problem in line


def test_examples_argument_equals_a_file(run, alone, data, tmp_path):
    rows = rows_of(data)
    assert run(tmp_path / "list", examples=rows)[0].state_digest == alone.state_digest
    run(tmp_path / "once", examples=iter(rows), stop_after=4)
    ended, events = run(tmp_path / "once", examples=iter(rows))
    assert steps_of(events) == [5, 6, 7, 8, 9]
    assert ended.state_digest == alone.state_digest
    config = CheckpointManager(tmp_path / "once" / "checkpoints").inspect(9).header.run_info["extra"]
    assert config["data"] == EXAMPLES


def test_changed_examples_are_refused_after_the_end(run, data, tmp_path):
    rows = rows_of(data)
    ended, _ = run(tmp_path, examples=rows)
    again, _ = run(tmp_path, examples=rows)
    assert again.already_finished
    assert again.state_digest == ended.state_digest
    with pytest.raises(ResumeRefused, match="its content is not that of the run"):
        run(tmp_path, examples=[*rows[:-1], {**rows[-1], "authority_weight": 0.123}])


def test_invalid_examples_fail_before_files_are_created(run, data, tmp_path):
    with pytest.raises(DataError) as caught:
        run(tmp_path / "run", examples=[*rows_of(data), {"text": 3}])
    assert caught.value.problems[0] == "examples[11]: text: a number, not a string; give its text"
    with pytest.raises(ConfigError, match="--eval-split test: a program's examples have no splits"):
        run(tmp_path / "run", examples=rows_of(data), eval_split="test")
    with pytest.raises(ConfigError, match="pass them again"):
        run(tmp_path / "run", data=EXAMPLES)
    assert not (tmp_path / "run").exists()


def test_generator_of_examples_can_be_used_once(data, tmp_path):
    config = TrainConfig(out=str(tmp_path), max_steps=2, save_every=0)
    trainer = DistrustTrainer(config, engine=ToyEngine(), examples=iter(rows_of(data)))
    trainer.train()
    with pytest.raises(DataError, match="examples: contains no records"):
        trainer.train()


def test_eval_examples_argument(data, eval_data, tmp_path):
    losses = []
    for out, options, eval_examples in (
        ("file", {"eval_data": str(eval_data)}, {}),
        ("program", {}, {"eval_examples": rows_of(eval_data)}),
    ):
        config = TrainConfig(out=str(tmp_path / out), data=str(data), max_steps=2, save_every=0, **options)
        DistrustTrainer(config, engine=ToyEngine(), observers=[losses.append], **eval_examples).train()
    first, second = [event.loss for event in losses if isinstance(event, Evaluated)]
    assert first == second
