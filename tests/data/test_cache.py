"""The cache of tokenized data: damaged entries are detected and rebuilt."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import sys
import tracemalloc
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distrust import DistrustWarning
from distrust.atomic import hold_lock
from distrust.data import (
    Cache,
    Columns,
    Corpus,
    DatasetStats,
    Limits,
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


def reader_of(*paths, w=None, h=None, columns=None):
    columns = columns or Columns()
    return RecordReader(tuple(open_source(str(path), columns) for path in paths), columns, w, h)


def load_or_build(cache, reader, *, key=KEY, tokenizer=TOKENIZER):
    """The corpus, and whether it was built."""
    stats = check_records(reader)
    builds = []

    def build():
        builds.append(True)
        limits = Limits(max_length=32)
        records = reader.records()
        return tokenize_in_blocks(records, tokenizer, stats=stats, limits=limits, today=date(2026, 1, 2))

    parts = [(part.name, part.unit) for source in reader.sources for part in source.parts]
    return cache.corpus(key, parts, build), bool(builds)


def entry(cache):
    return cache.folder / "tokens-4" / KEY


def names(cache):
    """What there is besides lock files, which stay."""
    return sorted(path.name for path in entry(cache).parent.iterdir() if path.suffix != ".lock")


def test_an_entry_is_built_once_and_equals_the_corpus_in_memory(data, cache):
    reader = reader_of(data)
    first, built = load_or_build(cache, reader)
    again, built_again = load_or_build(cache, reader)
    assert (built, built_again) == (True, False)
    plain = tokenize(list(reader.records()), TOKENIZER, max_length=32)
    for corpus in (first, again):
        assert corpus.fingerprint == plain.fingerprint
        assert corpus.counts == plain.counts
        for name in ("input_ids", "loss_mask", "starts", "lengths", "loss_tokens", "provenance_entropy"):
            assert np.array_equal(getattr(corpus, name), getattr(plain, name))
            assert getattr(corpus, name).dtype == getattr(plain, name).dtype
        assert list(corpus.locations) == list(plain.locations)
        assert corpus.locations[120] == Location(str(data), 121)
        assert isinstance(corpus.input_ids.base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            corpus.input_ids[0] = 1


def test_classes_are_numbered_across_blocks(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(tokens_module, "_BATCH_RECORDS", 4)
    sources = ["a", "b", "c", "b", "c", "a", "d", "b"]  # the blocks begin with different classes
    rows = [
        {"text": "salt", "authority_weight": 0.1, "provenance_entropy": 1, "source": source}
        for source in sources
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = reader_of(path)
    in_memory = tokenize(list(reader.records()), TOKENIZER, max_length=32)
    for corpus in (in_memory, load_or_build(cache, reader)[0], load_or_build(cache, reader)[0]):
        assert corpus.classes == ("a", "b", "c", "d")
        assert [corpus.classes[number] for number in corpus.class_numbers] == sources


def test_other_users_may_not_read_the_cache(data, cache):
    """Training data may be confidential."""
    reader = reader_of(data)
    load_or_build(cache, reader)
    cache.store_stats(KEY, check_records(reader))
    folders = [path for path in cache.folder.iterdir() if path.is_dir()]
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700, 0o700]


def test_several_sources_keep_their_sizes(data, cache, tmp_path):
    table = tmp_path / "other.csv"
    table.write_text("text,authority_weight,provenance_entropy\nsalt does not,0.5,1\n")
    corpus, _ = load_or_build(cache, reader_of(data, table))
    assert corpus.sizes == (RECORDS, 1)
    assert str(corpus.locations[RECORDS]) == f"{table}:2"


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
    ("file", "damage"),
    [
        *((file, "bit") for file in FILES),
        *(
            (file, damage)
            for file in ("corpus.json", "offsets")
            for damage in ("cut", "longer", "missing", "empty")
        ),
    ],
)
def test_a_damaged_entry_is_rebuilt(data, cache, file, damage):
    reader = reader_of(data)
    original, _ = load_or_build(cache, reader)
    path = entry(cache) / file
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged = {"bit": raw, "cut": raw[:-1], "longer": raw + b"\0", "empty": b""}
    path.unlink()  # mapped pages keep their content
    if damage != "missing":
        path.write_bytes(damaged[damage])
    with pytest.warns(DistrustWarning, match="are damaged .*; tokenizing again"):
        corpus, built = load_or_build(cache, reader)
    assert built
    assert corpus.fingerprint == original.fingerprint
    assert load_or_build(cache, reader)[1] is False
    assert names(cache) == [KEY]


def test_a_deleted_entry_is_rebuilt_and_mapped_arrays_stay_valid(data, cache):
    reader = reader_of(data)
    corpus, _ = load_or_build(cache, reader)
    tokens = corpus.input_ids.copy()
    for path in entry(cache).iterdir():
        path.unlink()
    entry(cache).rmdir()
    assert np.array_equal(corpus.input_ids, tokens)
    again, built = load_or_build(cache, reader)
    assert built
    assert again.fingerprint == corpus.fingerprint


CHILD = """
import os, signal, sys
sys.path[:0] = sys.argv[3].split(os.pathsep)
from pathlib import Path
from test_cache import TOKENIZER, Cache, load_or_build, reader_of
from distrust.data import cache
write, files = cache._append, set()
def append(file, array):
    write(file, array)
    if not files and sys.argv[4] == "pause":
        print("building", flush=True)
        sys.stdin.readline()
    files.add(file.name)
    if len(files) == 6 and sys.argv[4] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
cache._append = append
waits = iter(["waiting"])
cache = Cache(Path(sys.argv[2]), on_wait=lambda _: print(*waits, end=" ", flush=True))
corpus, built = load_or_build(cache, reader_of(sys.argv[1]))
print(built, corpus.fingerprint)
"""


@pytest.fixture
def start_child(data, cache, start_python, forked_python):
    def start(how):
        path = os.pathsep.join(sys.path)
        return start_python(CHILD, data, cache.folder, path, how, python=forked_python)

    return start


def test_the_leftovers_of_a_killed_process_are_not_used(data, cache, start_child):
    killed = start_child("die")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert [name[:12] for name in names(cache)] == ["unfinished-a"]
    _, built = load_or_build(cache, reader_of(data))
    assert built
    assert names(cache) == [KEY]


def test_the_next_builder_of_any_entry_removes_what_killed_ones_left(data, cache):
    odd, living = ["unfinished-", "unfinished--"], f"unfinished-{'d' * 64}-1a2b3c4d"
    killed = [f"unfinished-{'c' * 64}-1a2b3c4d", "unfinished-1a2b3c4d"]  # one of an earlier version
    for name in (*killed, *odd, living):
        (entry(cache).parent / name).mkdir(parents=True)
    with hold_lock(entry(cache).parent / f"{'d' * 64}.lock", flags=os.O_RDWR | os.O_CREAT):
        load_or_build(cache, reader_of(data))
    assert names(cache) == [KEY, *odd, living]


@pytest.mark.parametrize("end", ["finishes", "is killed"])
def test_one_process_builds_an_entry_while_another_waits(data, cache, start_child, end):
    builder = start_child("pause")
    assert builder.stdout.readline() == "building\n"
    waiting = start_child("wait")
    assert waiting.stdout.read(8) == "waiting "
    if end == "is killed":
        builder.kill()
    else:
        builder.stdin.write("\n")
        builder.stdin.flush()
        built, _ = builder.communicate(timeout=60)[0].split()
        assert built == "True"
    built, fingerprint = waiting.communicate(timeout=60)[0].split()
    assert built == str(end == "is killed")
    corpus, built_again = load_or_build(cache, reader_of(data))
    assert not built_again
    assert corpus.fingerprint == fingerprint
    assert names(cache) == [KEY]


def test_a_stop_ends_the_wait(data, cache):
    class StopError(Exception):
        pass

    def stop(times):
        if times == 2:
            raise StopError

    load_or_build(cache, reader_of(data))
    shutil.rmtree(entry(cache))
    with hold_lock(entry(cache).with_suffix(".lock"), flags=os.O_RDWR), pytest.raises(StopError):
        load_or_build(Cache(cache.folder, on_wait=stop), reader_of(data))
    assert names(cache) == []


def test_without_locks_each_process_builds(data, cache, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert load_or_build(cache, reader_of(data))[1]
    assert not load_or_build(cache, reader_of(data))[1]


def test_an_entry_that_another_process_published_stays(data, cache, monkeypatch):
    """As it may happen on a network file system: that process has mapped it."""
    reader = reader_of(data)
    publish = cache_module._publish

    def publish_second(folder, target):
        shutil.copytree(folder, target)
        inode = target.stat().st_ino
        publish(folder, target)
        assert target.stat().st_ino == inode

    monkeypatch.setattr(cache_module, "_publish", publish_second)
    assert load_or_build(cache, reader)[1]
    assert not load_or_build(cache, reader)[1]


def test_without_a_writable_folder_nothing_is_cached(data, tmp_path):
    (tmp_path / "file").touch()
    cache = Cache(tmp_path / "file" / "cache")
    for _ in range(2):
        with pytest.warns(DistrustWarning, match="cannot be written to .* --cache-dir"):
            corpus, built = load_or_build(cache, reader_of(data))
        assert built
        assert len(corpus) == RECORDS
        assert corpus.loss_tokens.sum() > 0
    stats = check_records(reader_of(data))
    cache.store_stats(KEY, stats)
    assert cache.stats(KEY) is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_reported_and_leaves_no_files(data, cache, monkeypatch):
    def full(file, array):
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")

    monkeypatch.setattr(cache_module, "_append", full)
    with pytest.raises(ConfigError, match="cannot write the tokens: No space left on device; give another"):
        load_or_build(cache, reader_of(data))
    assert names(cache) == []


def test_a_tokenizer_without_a_digest_is_not_cached(data, cache):
    class Bytes:
        bos_token_id = pad_token_id = chat_template = None
        eos_token_id = 256

        def encode(self, text, *, add_special_tokens):
            return list(text.encode())

    assert digest_tokenizer(Bytes()) is None
    corpus, built = load_or_build(cache, reader_of(data), key=None, tokenizer=Bytes())
    assert built
    assert len(corpus) == RECORDS
    assert not cache.folder.exists()


def test_stats_of_a_check_are_stored(data, cache):
    reader = reader_of(data)
    stats = check_records(reader)
    assert cache.stats(reader.key) is None
    cache.store_stats(reader.key, stats)
    assert cache.stats(reader.key) == stats
    (path,) = (cache.folder / "checked-3").iterdir()
    path.write_bytes(path.read_bytes().replace(b"150", b"151"))
    assert cache.stats(reader.key) is None


def test_the_key_depends_on_the_content_and_how_it_is_read(data, tmp_path):
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(data.read_bytes())
    key = reader_of(data).key
    assert reader_of(moved).key == key
    moved.write_bytes(data.read_bytes().replace(b"ore", b"oar", 1))
    keys = {
        reader_of(moved).key,
        reader_of(data, h=1.0).key,
        reader_of(data, w=0.5).key,
        reader_of(data, columns=Columns(text="body")).key,
        reader_of(data, data).key,
    }
    assert len({key, *keys}) == 6


def test_the_digest_of_a_tokenizer_depends_on_its_behavior():
    digest = digest_tokenizer(TOKENIZER)
    assert digest == digest_tokenizer(fast_tokenizer())
    TOKENIZER.encode("ore", truncation=True, max_length=2)  # leaves truncation set in its core
    assert digest_tokenizer(TOKENIZER) == digest
    chat = fast_tokenizer()
    chat.chat_template = "{{ messages }}"
    assert len({digest, digest_tokenizer(chat), digest_tokenizer(fast_tokenizer(special="<end>"))}) == 3


def test_four_times_the_data_need_no_more_memory(tmp_path, monkeypatch):
    for module, name, small in (
        (tokens_module, "_BATCH_RECORDS", 50),
        (sources_module, "_BLOCK", 1 << 16),
        (cache_module, "BLOCK", 1 << 16),
    ):
        monkeypatch.setattr(module, name, small)  # so that little data has many blocks
    line = (
        json.dumps({"text": "the ore melts " * 150, "authority_weight": 0.1, "provenance_entropy": 1}) + "\n"
    )
    peaks = []
    for lines in (100, 150, 600):  # the first warms up
        path = tmp_path / f"{lines}.jsonl"
        path.write_text(line * lines)
        tracemalloc.start()
        corpus, built = load_or_build(Cache(tmp_path / "cache"), reader_of(path), key=str(lines))
        assert built
        assert len(list(corpus.locations)) == lines
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The file is 1 MB longer; each example adds only its numbers.
    assert peaks[2] - peaks[1] < 100_000


@given(st.lists(st.text(min_size=1), max_size=5))
def test_encoding_a_batch_equals_encoding_each_text(texts):
    TOKENIZER.encode("ore", truncation=True, max_length=2)
    TOKENIZER.backend_tokenizer.enable_padding()
    texts = ["the ore <eos> melts", *texts]
    expected = [TOKENIZER.encode(text, add_special_tokens=False) for text in texts]
    assert [encoded.ids for encoded in encode_all(TOKENIZER, texts)] == expected


def test_a_tokenizer_that_does_more_than_its_core_encodes_one_by_one():
    class Shouting(PreTrainedTokenizerFast):
        def encode(self, text, **options):
            return super().encode(text.upper(), **options)

    shouting = Shouting(tokenizer_object=fast_tokenizer().backend_tokenizer, eos_token="<eos>")
    assert [encoded.ids for encoded in encode_all(shouting, ["ore", "salt"])] == [
        TOKENIZER.encode(text, add_special_tokens=False) for text in ("ORE", "SALT")
    ]


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=20), st.integers(1, 12))
def test_loss_tokens_are_counted_across_blocks(examples, block):
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
        weights = [10.0 ** (30 - 3 * index) for index in range(len(examples)) for _ in examples[index]]
        weighted = replace(corpus, token_weights=np.array(weights, np.float32))
        sums = [sum(flags) * 10.0 ** (30 - 3 * index) for index, flags in enumerate(examples)]
        assert weighted.loss_weights.tolist() == pytest.approx(sums, rel=1e-6)  # not lost beside larger ones
        fingerprint = corpus.fingerprint
    vars(corpus).pop("fingerprint")
    assert corpus.fingerprint == fingerprint


def test_stats_that_cannot_be_stored_leave_no_files(tmp_path, monkeypatch):
    def replace(*_):
        raise OSError

    monkeypatch.setattr(os, "replace", replace)
    Cache(tmp_path).store_stats("key", DatasetStats((1,)))
    assert Cache(tmp_path).stats("key") is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_cache_does_not_lead_elsewhere(data, cache, tmp_path):
    """Whoever made the folder must not choose where data is written."""
    (tmp_path / "outside").mkdir()
    cache.folder.mkdir()
    for name in ("tokens-4", "checked-3"):
        (cache.folder / name).symlink_to(tmp_path / "outside")
    with pytest.warns(DistrustWarning, match=r"tokens-4: cannot be written to .* a link.*--cache-dir"):
        assert load_or_build(cache, reader_of(data))[1]
    cache.store_stats(KEY, DatasetStats((1,)))
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("name", ["corpus.json", "input_ids", "class_of"])
def test_a_pipe_in_an_entry_is_damage(data, cache, name):
    load_or_build(cache, reader_of(data))
    (entry(cache) / name).unlink()
    os.mkfifo(entry(cache) / name)  # opening it would wait for a writer, forever
    cache.store_stats(KEY, DatasetStats((1,)))
    with pytest.warns(DistrustWarning, match="cached tokens are damaged"):
        assert load_or_build(cache, reader_of(data))[1]
    (cache.folder / "checked-3" / f"{KEY}.json").unlink()
    os.mkfifo(cache.folder / "checked-3" / f"{KEY}.json")
    assert cache.stats(KEY) is None
