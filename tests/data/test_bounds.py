"""A small file must not fill the memory: records have a limit in every format, and so have pages."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrust.cli import generate
from distrust.config_text import from_toml
from distrust.data import read_records
from distrust.data.parquet import bounded_rows, read_batches
from distrust.data.parquet_pages import read_pages
from distrust.data.provenance.table import load_table
from distrust.errors import ConfigError, DataError

PROVENANCE = {"authority_weight": 0.5, "provenance_entropy": 1.0}
LIMIT = 4000  # bytes
SHORT, LONG = "x" * 100, "x" * 5000


def _write_csv(path, rows, delimiter):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(path, rows, **options):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)


def _write_saved(path, rows):
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(path)


WRITERS = {
    "lines.jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "lines.jsonl.gz": lambda path, rows: path.write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    ),
    "list.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "table.csv": lambda path, rows: _write_csv(path, rows, ","),
    "table.tsv": lambda path, rows: _write_csv(path, rows, "\t"),
    "plain.parquet": lambda path, rows: _write_parquet(path, rows, use_dictionary=False),
    "dictionary.parquet": _write_parquet,
}


@pytest.mark.parametrize("name", [*WRITERS, "saved"])
def test_a_record_above_the_limit_is_an_error_with_its_location(tmp_path, name):
    path = tmp_path / name
    write = WRITERS.get(name, _write_saved)
    write(path, [{**PROVENANCE, "text": text} for text in (SHORT, LONG, SHORT)])
    assert len(read_records(path)) == 3
    with pytest.raises(DataError) as caught:
        read_records(path, max_record_bytes=LIMIT)
    (problem,) = caught.value.problems
    where = ":3: " if name.startswith("table.") else ": row 2: " if "." not in name else None
    assert (where or (": row 2: " if name.endswith((".json", ".parquet")) else ":2: ")) in problem
    assert f"takes more than {LIMIT:,} bytes" in problem
    assert "--max-record-bytes" in problem


@pytest.mark.parametrize("cell", ['"' + "a\n" * LIMIT, "," * 2 * LIMIT])
def test_a_csv_row_is_limited_over_all_its_lines_and_cells(tmp_path, cell):
    path = tmp_path / "table.csv"
    path.write_text(f"text,authority_weight,provenance_entropy\nshort,0.5,1\n{cell}")
    with pytest.raises(DataError, match=":3: takes more than") as caught:
        read_records(path, max_record_bytes=LIMIT)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("key", ["text", "messages"])
def test_a_value_that_a_table_repeats_counts_each_time(tmp_path, key):
    """It is stored once."""
    path = tmp_path / "a.parquet"
    turns = [{"role": "user", "content": 4 * SHORT}, {"role": "assistant", "content": 4 * SHORT}]
    rows = {
        "text": [SHORT] * 1000,
        "messages": [turns, turns * 50],
    }[key]
    _write_parquet(path, [{**PROVENANCE, key: value} for value in rows])
    if key == "text":
        assert len(read_records(path, max_record_bytes=LIMIT)) == 1000
    else:
        with pytest.raises(DataError, match="row 2: takes more than"):
            read_records(path, max_record_bytes=LIMIT)


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_only_long_values_that_repeat_stay_in_a_dictionary(tmp_path, codec, version):
    """Dictionary arrays are slow to read."""

    def kind_of(turns):
        path = tmp_path / "a.parquet"
        options = {"compression": codec, "data_page_version": version}
        _write_parquet(path, [{"turns": turns}], **options)
        with path.open("rb") as file:
            (batch,) = read_batches(file, ["turns"], LIMIT, dictionaries=True)
        assert batch.to_pylist() == [{"turns": turns}]
        return batch.column("turns").type.value_type

    assert pyarrow.types.is_dictionary(kind_of(["b", *[LONG] * 200]))
    assert not pyarrow.types.is_dictionary(kind_of(["b", *["c" * 4] * 1000]))


@settings(max_examples=40)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {
                "text": st.one_of(st.none(), st.text(max_size=9), st.just(LONG)),
                "weight": st.one_of(st.none(), st.floats(allow_nan=False)),
                "turns": st.one_of(
                    st.none(),
                    st.lists(st.fixed_dictionaries({"role": st.text(max_size=5), "n": st.integers(0, 9)})),
                ),
            }
        ),
        min_size=1,
        max_size=60,
    ),
    options=st.fixed_dictionaries(
        {
            "compression": st.sampled_from(["none", "snappy", "zstd", "gzip"]),
            "use_dictionary": st.booleans(),
            "data_page_version": st.sampled_from(["1.0", "2.0"]),
            "data_page_size": st.sampled_from([16, 1 << 20]),
            "row_group_size": st.integers(1, 60),
            "write_page_checksum": st.booleans(),
        }
    ),
    dictionaries=st.booleans(),
)
def test_tables_are_read_as_pyarrow_reads_them(tmp_path_factory, rows, options, dictionaries):
    path = tmp_path_factory.mktemp("tables") / "a.parquet"
    _write_parquet(path, rows, **options)
    table = pyarrow.parquet.read_table(path)
    with path.open("rb") as file:
        streamed = [
            row
            for batch in read_batches(file, table.column_names, 1 << 20, dictionaries=dictionaries)
            for row in bounded_rows(batch, 1 << 20)
        ]
        assert streamed == table.to_pylist()
        metadata = pyarrow.parquet.read_metadata(path)
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                pages = list(read_pages(file, column))
                assert sum(page.values for page in pages if not page.is_dictionary) == column.num_values
                assert sum(page.size for page in pages) < column.total_uncompressed_size


def _bombs(folder):
    """Files of a few KB, which stand for gigabytes."""
    for name, beginning in {
        "a.jsonl": b'{"text": "',
        "b.csv": b"text,authority_weight,provenance_entropy\n",
        "c.json": b'[{"text": "a"}, ',
        "d.json": b'[{"text": "' + b"a" * 100,
    }.items():
        (folder / name).write_bytes(beginning)
        os.truncate(folder / name, 1 << 40)  # a hole
    letters = gzip.compress(b"a" * (1 << 24)) * 128  # 2 GiB
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "') + letters)
    (folder / "f.csv.gz").write_bytes(gzip.compress(b'text,authority_weight,provenance_entropy\n"') + letters)
    (folder / "g.json.gz").write_bytes(gzip.compress(b'[{"text": "') + letters)
    text = pyarrow.array(["a" * ((1 << 27) + 100)])
    numbers = {name: pyarrow.array([value]) for name, value in PROVENANCE.items()}
    plain = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    pyarrow.parquet.write_table(pyarrow.table({"text": text, **numbers}), folder / "h.parquet", **plain)
    turns = pyarrow.DictionaryArray.from_arrays(pyarrow.repeat(pyarrow.scalar(0), (1 << 24) + 1), ["hi"])
    messages = pyarrow.ListArray.from_arrays([0, len(turns)], turns)
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages, **numbers}), folder / "i.parquet")


READ = """
import resource, sys
from pathlib import Path
from distrust.cli import generate
from distrust.config_text import from_toml
from distrust.data import read_records
from distrust.data.provenance.table import load_table
from distrust.errors import ConfigError, DataError
import pyarrow.parquet, pyarrow.compute
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))  # in case that it fails
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = peak()
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_records(path)
    except DataError as error:
        print(path.name, (peak() - began) >> 10, str(error).splitlines()[-1])
"""


def test_a_small_file_does_not_fill_the_memory(tmp_path):
    _bombs(tmp_path)
    command = [sys.executable, "-c", READ, tmp_path]
    reader = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert reader.stderr == ""
    lines = [line.split(" ", 2) for line in reader.stdout.splitlines()]
    assert [name for name, *_ in lines] == sorted(os.listdir(tmp_path))
    for name, mebibytes, message in lines:
        assert int(mebibytes) < 400, name
        words = "a page of " if name == "h.parquet" else "lists of " if name == "i.parquet" else ""
        assert words in message
        assert "--max-record-bytes" in message or "zero bytes" in message


@pytest.mark.parametrize("read", [from_toml, load_table])
def test_a_file_of_options_is_not_read_without_a_limit(tmp_path, read):
    path = tmp_path / "options.toml"
    path.write_text("# options\n")
    os.truncate(path, 1 << 40)
    with pytest.raises(ConfigError, match="more than 16,777,216 bytes"):
        read(path)
    path.write_text("a = " + "[" * 10_000)
    with pytest.raises(ConfigError, match="not valid TOML"):
        read(path)


def test_a_prompt_has_a_limit(monkeypatch):
    with open("/dev/zero", encoding="utf-8") as endless:
        monkeypatch.setattr("sys.stdin", endless)
        with pytest.raises(DataError, match="prompt 1: takes more than"):
            generate.main(["--checkpoint", __file__])
