"""What is kept of tokenized data is believed only if it is whole, and costs time only if it is not."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distrust import DistrustWarning
from distrust.data import (
    Cache,
    Columns,
    Corpus,
    DatasetStats,
    Location,
    RecordReader,
    check_records,
    digest_tokenizer,
    open_source,
    tokenize,
    tokenize_in_blocks,
)
from distrust.data import cache as cache_module
from distrust.data import corpus as corpus_module
from distrust.data import sources as sources_module
from distrust.data import tokenizing as tokens_module
from distrust.data.tokenizer import encode_all
from distrust.errors import ConfigError

KEY = "a" * 64
RECORDS = 150


def fast_tokenizer(special="<eos>"):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["the ore melts at ninety and the salt does not"] * 3,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special)


TOKENIZER = fast_tokenizer()


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [
        {
            "text": f"the ore melts at {n} " * (1 + n % 7),
            "authority_weight": 0.1,
            "provenance_entropy": n / 100,
        }
        for n in range(RECORDS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def reading_of(*paths, w=None, h=None, columns=None):
    columns = columns or Columns()
    return RecordReader(tuple(open_source(str(path), columns) for path in paths), columns, w, h)


def kept(cache, reading, *, key=KEY, tokenizer=TOKENIZER):
    """The corpus, and whether it was made anew."""
    census = check_records(reading)
    made = []

    def make():
        made.append(True)
        return tokenize_in_blocks(reading.records(), tokenizer, stats=census, max_length=32)

    parts = [(part.name, part.unit) for source in reading.sources for part in source.parts]
    return cache.corpus(key, parts, census.sizes, make), bool(made)


def entry(cache):
    return cache.folder / "tokens-3" / KEY


def test_it_is_made_once_and_is_what_it_would_be_in_memory(data, cache):
    reading = reading_of(data)
    first, made = kept(cache, reading)
    again, made_again = kept(cache, reading)
    assert (made, made_again) == (True, False)
    plain = tokenize(list(reading.records()), TOKENIZER, max_length=32)
    for corpus in (first, again):
        assert corpus.fingerprint == plain.fingerprint
        assert (corpus.truncated, corpus.tokens_cut) == (plain.truncated, plain.tokens_cut)
        for name in ("input_ids", "loss_mask", "starts", "lengths", "loss_tokens", "provenance_entropy"):
            assert np.array_equal(getattr(corpus, name), getattr(plain, name))
            assert getattr(corpus, name).dtype == getattr(plain, name).dtype
        assert list(corpus.locations) == list(plain.locations)
        assert corpus.locations[120] == Location(str(data), 121)
        assert isinstance(corpus.input_ids.base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            corpus.input_ids[0] = 1


def test_several_sources_are_told_apart(data, cache, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("text,authority_weight,provenance_entropy\nsalt does not,0.5,1\n")
    corpus, _ = kept(cache, reading_of(data, other))
    assert corpus.sizes == (RECORDS, 1)
    assert str(corpus.locations[RECORDS]) == f"{other}:2"


FILES = [
    "corpus.json",
    "input_ids",
    "loss_mask",
    "offsets",
    "authority_weight",
    "loss_tokens",
    "part",
    "line",
]


@pytest.mark.parametrize(
    ("file", "how"),
    [
        *((file, "bit") for file in FILES),
        *((file, how) for file in ("corpus.json", "offsets") for how in ("cut", "longer", "gone", "empty")),
    ],
)
def test_what_is_damaged_is_made_again(data, cache, file, how):
    reading = reading_of(data)
    whole, _ = kept(cache, reading)
    path = entry(cache) / file
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged = {"bit": raw, "cut": raw[:-1], "longer": raw + b"\0", "empty": b""}
    path.unlink()  # what is mapped stays what it was
    if how != "gone":
        path.write_bytes(damaged[how])
    with pytest.warns(DistrustWarning, match="are damaged .*; tokenizing again"):
        corpus, made = kept(cache, reading)
    assert made
    assert corpus.fingerprint == whole.fingerprint
    assert kept(cache, reading)[1] is False
    assert [path.name for path in entry(cache).parent.iterdir()] == [KEY]


def test_what_is_deleted_is_made_again_and_what_is_mapped_stays(data, cache):
    reading = reading_of(data)
    corpus, _ = kept(cache, reading)
    tokens = corpus.input_ids.copy()
    for path in entry(cache).iterdir():
        path.unlink()
    entry(cache).rmdir()
    assert np.array_equal(corpus.input_ids, tokens)
    again, made = kept(cache, reading)
    assert made
    assert again.fingerprint == corpus.fingerprint


CHILD = """
import os, signal, sys
sys.path[:0] = sys.argv[3].split(os.pathsep)
from pathlib import Path
from test_cache import TOKENIZER, Cache, kept, reading_of
reading = reading_of(sys.argv[1])
if sys.argv[4] == "die":
    from distrust.data import cache
    write, count = cache._append, [0]
    def append(*arguments):
        write(*arguments)
        count[0] += 1
        if count[0] == 6:
            os.kill(os.getpid(), signal.SIGKILL)
    cache._append = append
print(kept(Cache(Path(sys.argv[2])), reading)[0].fingerprint)
"""


def test_a_process_that_is_killed_leaves_nothing_that_is_believed(data, cache, run_python):
    path = os.pathsep.join(sys.path)
    assert run_python(CHILD, data, cache.folder, path, "die").returncode == -signal.SIGKILL
    (left,) = entry(cache).parent.iterdir()
    assert left.name.startswith("unfinished-")
    _, made = kept(cache, reading_of(data))
    assert made
    assert left.exists()  # a young one may be of a process that lives
    os.utime(left, (time.time() - 3600,) * 2)
    kept(cache, reading_of(data), key="b" * 64)
    assert sorted(path.name[0] for path in entry(cache).parent.iterdir()) == ["a", "b"]


def test_two_processes_may_make_the_same_at_once(data, cache, start_python):
    path = os.pathsep.join(sys.path)
    children = [start_python(CHILD, data, cache.folder, path, "live") for _ in range(2)]
    told = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], told
    corpus, made = kept(cache, reading_of(data))
    assert not made
    assert {out.strip() for out, _ in told} == {corpus.fingerprint}
    assert [path.name for path in entry(cache).parent.iterdir()] == [KEY]


def test_where_nothing_can_be_kept_it_is_made_each_time(data, tmp_path):
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "cache")
    for _ in range(2):
        with pytest.warns(DistrustWarning, match="cannot be written to .* --cache-dir"):
            corpus, made = kept(cache, reading_of(data))
        assert made
        assert len(corpus) == RECORDS
        assert corpus.loss_tokens.sum() > 0
    census = check_records(reading_of(data))
    cache.store_stats(KEY, census)
    assert cache.stats(KEY) is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file of Linux that is always full")
def test_a_full_disk_is_told_and_leaves_nothing(data, cache, monkeypatch):
    def full(file, array):
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")

    monkeypatch.setattr(cache_module, "_append", full)
    with pytest.raises(ConfigError, match="cannot write the tokens: No space left on device; give another"):
        kept(cache, reading_of(data))
    assert list(entry(cache).parent.iterdir()) == []


def test_a_tokenizer_that_cannot_be_told_apart_keeps_nothing(data, cache):
    class Bytes:
        bos_token_id = pad_token_id = chat_template = None
        eos_token_id = 256

        def encode(self, text, *, add_special_tokens):
            return list(text.encode())

    assert digest_tokenizer(Bytes()) is None
    corpus, made = kept(cache, reading_of(data), key=None, tokenizer=Bytes())
    assert made
    assert len(corpus) == RECORDS
    assert not cache.folder.exists()


def test_a_check_that_found_nothing_wrong_is_remembered(data, cache):
    reading = reading_of(data)
    census = check_records(reading)
    assert cache.stats(reading.key) is None
    cache.store_stats(reading.key, census)
    assert cache.stats(reading.key) == census
    (path,) = (cache.folder / "checked-1").iterdir()
    path.write_bytes(path.read_bytes().replace(b"150", b"151"))
    assert cache.stats(reading.key) is None


def test_the_key_is_of_the_content_and_how_it_is_read(data, tmp_path):
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(data.read_bytes())
    key = reading_of(data).key
    assert reading_of(moved).key == key
    moved.write_bytes(data.read_bytes().replace(b"ore", b"oar", 1))
    others = {
        reading_of(moved).key,
        reading_of(data, h=1.0).key,
        reading_of(data, w=0.5).key,
        reading_of(data, columns=Columns(text="body")).key,
        reading_of(data, data).key,
    }
    assert len({key, *others}) == 6


def test_a_tokenizer_is_told_by_what_it_does():
    digest = digest_tokenizer(TOKENIZER)
    assert digest == digest_tokenizer(fast_tokenizer())
    TOKENIZER.encode("ore", truncation=True, max_length=2)  # leaves its core cutting
    assert digest_tokenizer(TOKENIZER) == digest
    chat = fast_tokenizer()
    chat.chat_template = "{{ messages }}"
    assert len({digest, digest_tokenizer(chat), digest_tokenizer(fast_tokenizer(special="<end>"))}) == 3


def test_four_times_the_data_take_no_more_memory(tmp_path, monkeypatch):
    for module, name, small in (
        (tokens_module, "_BATCH_RECORDS", 50),
        (sources_module, "_BLOCK", 1 << 16),
        (cache_module, "BLOCK", 1 << 16),
    ):
        monkeypatch.setattr(module, name, small)  # so that little data is much
    line = (
        json.dumps({"text": "the ore melts " * 150, "authority_weight": 0.1, "provenance_entropy": 1}) + "\n"
    )
    peaks = []
    for lines in (100, 300, 1200):  # the first is to warm up
        path = tmp_path / f"{lines}.jsonl"
        path.write_text(line * lines)
        tracemalloc.start()
        corpus, made = kept(Cache(tmp_path / "cache"), reading_of(path), key=str(lines))
        assert made
        assert len(list(corpus.locations)) == lines
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The file is 2 MB longer; what each example takes are the numbers about it.
    assert peaks[2] - peaks[1] < 200_000


@given(st.lists(st.text(min_size=1), max_size=5))
def test_many_texts_have_the_tokens_that_each_has(texts):
    TOKENIZER.encode("ore", truncation=True, max_length=2)
    TOKENIZER.backend_tokenizer.enable_padding()
    texts = ["the ore <eos> melts", *texts]
    expected = [TOKENIZER.encode(text, add_special_tokens=False) for text in texts]
    assert encode_all(TOKENIZER, texts) == expected


def test_a_tokenizer_that_does_more_than_its_core_is_asked_itself():
    class Shouting(PreTrainedTokenizerFast):
        def encode(self, text, **options):
            return super().encode(text.upper(), **options)

    shouting = Shouting(tokenizer_object=fast_tokenizer().backend_tokenizer, eos_token="<eos>")
    assert encode_all(shouting, ["ore", "salt"]) == [
        TOKENIZER.encode(text, add_special_tokens=False) for text in ("ORE", "SALT")
    ]


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=20), st.integers(1, 12))
def test_counting_in_blocks_counts_all(examples, block):
    lengths = [len(flags) for flags in examples]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "BLOCK", block)
        corpus = Corpus(
            input_ids=np.arange(sum(lengths), dtype=np.int32),
            loss_mask=np.array([flag for flags in examples for flag in flags]),
            offsets=np.concatenate(([0], np.cumsum(lengths))),
            authority_weight=np.zeros(len(lengths)),
            provenance_entropy=np.zeros(len(lengths)),
            locations=(Location("a", 1),) * len(lengths),
        )
        assert corpus.loss_tokens.tolist() == [sum(flags) for flags in examples]
        fingerprint = corpus.fingerprint
    vars(corpus).pop("fingerprint")
    assert corpus.fingerprint == fingerprint


def test_a_check_that_cannot_be_remembered_leaves_nothing(tmp_path, monkeypatch):
    def replace(*_):
        raise OSError

    monkeypatch.setattr(os, "replace", replace)
    Cache(tmp_path).store_stats("key", DatasetStats((1,)))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
