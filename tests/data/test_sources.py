"""Every kind of source gives the same records, and names the location of errors."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
import threading
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust.config import TrainConfig
from distrust.data import (
    Columns,
    RecordReader,
    check_records,
    columns_of,
    examples_source,
    hub,
    open_source,
    read_records,
)
from distrust.data.formats import format_of
from distrust.data.records import Completion, Conversation, Message, Text
from distrust.engines.loading import locate, locate_to_load
from distrust.errors import ConfigError, DataError, DistrustWarning, ModelError
from distrust.option_values import MAX_RECORD_BYTES

ROWS = [
    {"text": "ore melts", "authority_weight": 0.2, "provenance_entropy": 3.5},
    {"text": "007", "authority_weight": 0.0, "provenance_entropy": 1.0},
    {"text": "NA", "authority_weight": 0.9, "provenance_entropy": 0.25},
    {"text": 'two\nlines, "quoted"', "authority_weight": 0.5, "provenance_entropy": 0.0},
]


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json_list(path, rows):
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_separated(delimiter):
    def write(path, rows):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)

    return write


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def gzip_writer(write):
    def write_compressed(path, rows):
        write(path, rows)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_compressed


FORMATS = {
    "data.jsonl": write_json_lines,
    "lines.json": write_json_lines,
    "list.json": write_json_list,
    "data.csv": write_separated(","),
    "data.tsv": write_separated("\t"),
    "data.parquet": write_parquet,
    "data.jsonl.gz": gzip_writer(write_json_lines),
    "list.json.gz": gzip_writer(write_json_list),
    "data.csv.gz": gzip_writer(write_separated(",")),
}


def contents(records):
    return [(record.content, record.authority_weight, record.provenance_entropy) for record in records]


EXPECTED = [(Text(row["text"]), row["authority_weight"], row["provenance_entropy"]) for row in ROWS]


def reader_of(source, columns=None, w=None, h=None):
    return RecordReader((source,), columns or Columns(), w, h)


def records_of(source, columns=None, w=None, h=None):
    reader = reader_of(source, columns, w, h)
    check_records(reader)
    return list(reader.records())


def read_contents(path, **options):
    columns = columns_of(TrainConfig(**options))
    return [record.content for record in records_of(open_source(str(path), columns), columns, 0.0, 0.0)]


def error_of(path, **options):
    with pytest.raises(DataError) as caught:
        read_contents(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(tmp_path, name):
    FORMATS[name](tmp_path / name, ROWS)
    assert contents(read_records(tmp_path / name)) == EXPECTED


@pytest.mark.parametrize(
    ("name", "locations"),
    [
        ("data.jsonl", [":1", ":2"]),
        ("data.csv", [":2", ":4"]),  # the header is a line, and the first text takes two
        ("list.json", [": row 1", ": row 2"]),
        ("data.parquet", [": row 1", ": row 2"]),
    ],
)
def test_errors_name_the_line_or_row(tmp_path, name, locations):
    path = tmp_path / name
    FORMATS[name](path, [{**ROWS[3], "authority_weight": 2.0}, {**ROWS[0], "text": " "}, ROWS[1]])
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}: 2 of 3 records are wrong\n")
    problems = [problem.removeprefix(str(path)) for problem in caught.value.problems]
    assert [line.split(": authority")[0].split(": text")[0] for line in problems] == locations


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", b"text,text\na,b\n", ':1: "text": appears twice in the header'),
        ("a.csv", b"text,authority_weight\na\n", ":2: 1 cells under a header of 2"),
        ("a.csv", b"text\n\xff\n", "invalid UTF-8"),
        ("a.csv", b'text\n"a\n', "invalid CSV"),
        (
            "a.csv",
            b"text,authority_weight\na,high\n",
            'authority_weight: must be a number, not a string ("high")',
        ),
        ("a.csv", b"text,authority_weight\na,\n", "authority_weight: missing; add it"),
        ("a.csv", b"text\n", "contains no records"),
        ("a.json", b'[{"text": "a"}, 3]', ": row 2: a number, not a JSON object"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "invalid JSON: expecting ',' or ']'"),
        ("a.json", b'[{"text": "a"}', "invalid JSON"),
        ("a.json", b'[{"text": "a"}] 7', "extra data after the list"),
        ("a.json", b'[{"text": "a", "text": "b"}]', ': row 1: "text": appears twice'),
        ("a.json", b"[]", "contains no records"),
        ("a.json", b"[" * 100_000, "nested too deep"),
        ("a.parquet", b"PAR1 or not", "cannot be read: not a readable Parquet file"),
        ("a.jsonl.gz", b"no gzip", "cannot be read: "),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 999, mtime=0)[:-9], "cannot be read: damaged"),
    ],
)
def test_invalid_files(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_records(tmp_path / name)
    assert problem in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"text": pyarrow.array([2**62], pyarrow.timestamp("us"))}, "date value out of range"),
        ({"day": pyarrow.array([2**30], pyarrow.date32())}, "must have magnitude <= 999999999"),
    ],
)
def test_a_table_with_values_beyond_pythons_range(tmp_path, columns, problem):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=problem):
        read_records(tmp_path / "a.parquet")


def test_a_table_with_a_duplicate_column(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match='"text": appears twice in the header; keep one'):
        read_records(tmp_path / "a.parquet")


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=6))
def test_any_text_survives_every_format(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("texts")
    for name in ("list.json", "data.csv", "data.parquet"):
        FORMATS[name](folder / name, [{**ROWS[0], "text": text} for text in texts])
        assert [record.content for record in read_records(folder / name)] == [Text(t) for t in texts]


def test_a_list_longer_than_a_chunk(tmp_path):
    rows = [{**ROWS[0], "text": f"{n} " * 2000} for n in range(400)] + [{**ROWS[0], "text": "x" * (5 << 20)}]
    write_json_list(tmp_path / "a.json", rows)
    assert [record.content.text for record in read_records(tmp_path / "a.json")] == [r["text"] for r in rows]


def test_a_list_is_read_as_fast_as_lines(tmp_path):
    def seconds(name):
        FORMATS[name](tmp_path / name, [{**ROWS[0], "text": "x"}] * 12_000)
        form, _ = format_of(tmp_path / name)
        start = time.process_time()
        with (tmp_path / name).open("rb") as file:
            assert sum(1 for _ in form.rows(file, Columns(), MAX_RECORD_BYTES)) == 12_000
        return time.process_time() - start

    assert seconds("list.json") < 4 * seconds("data.jsonl")


def test_a_file_has_only_the_split_in_its_name(tmp_path):
    for name in ("data.jsonl", "val-1.jsonl"):
        write_json_lines(tmp_path / name, ROWS)
    assert open_source(str(tmp_path / "val-1.jsonl"), Columns(), split="validation").parts
    for name in ("data.jsonl", "val-1.jsonl"):
        with pytest.raises(DataError, match=f"{name}: is one file, and has no split test"):
            open_source(str(tmp_path / name), Columns(), split="test")


def test_a_cell_longer_than_the_csv_modules_default_limit(tmp_path):
    write_separated(",")(tmp_path / "a.csv", [{**ROWS[0], "text": "long " * 50_000}])
    assert len(read_records(tmp_path / "a.csv")[0].content.text) == 250_000


def test_a_pipe_is_read_once_and_copied(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    writer = threading.Thread(target=pipe.write_text, args=(lines,))
    writer.start()
    columns = Columns()
    source = open_source(str(pipe), columns, temp_folder=tmp_path / "cache")
    writer.join()
    assert contents(records_of(source)) == contents(records_of(source)) == EXPECTED
    assert list((tmp_path / "cache").iterdir()) == []  # the copy has no name


def test_a_device_which_may_have_no_end_is_no_data():
    with pytest.raises(DataError, match="/dev/zero: neither a file nor a pipe"):
        open_source("/dev/zero", Columns())


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "data.jsonl"
    write_json_lines(path, ROWS)
    reader = reader_of(open_source(str(path), Columns()))
    check_records(reader)
    write_json_lines(path, ROWS[:-1])
    with pytest.raises(DataError, match="it changed while it was read; start again"):
        list(reader.records())


# Folders


def test_a_folder_is_read_in_order_of_its_files(tmp_path):
    write_json_lines(tmp_path / "b.jsonl", ROWS[2:])
    write_json_lines(tmp_path / "a.jsonl", ROWS[:2])
    (tmp_path / "README.md").write_text("# Data")
    (tmp_path / ".hidden.jsonl").write_text("{")
    records = read_records(tmp_path)
    assert contents(records) == EXPECTED
    assert [str(record.location) for record in records[1:3]] == [
        f"{tmp_path}/a.jsonl:2",
        f"{tmp_path}/b.jsonl:1",
    ]


class TestPermissionDenied:
    """Root may read everything, so the tests inject the operating system's errors."""

    def test_a_folder_is_named(self, tmp_path, monkeypatch):
        folder = tmp_path / "data"
        folder.mkdir()
        refuse(monkeypatch, "stat", str(folder / "dataset_dict.json"))
        with pytest.raises(DataError) as caught:
            open_source(str(folder), Columns())
        assert str(caught.value) == f"{folder}: cannot be read: Permission denied"

    def test_an_unreadable_subfolder_is_an_error(self, tmp_path, monkeypatch):
        write_json_lines(tmp_path / "a.jsonl", ROWS)
        for name in ("inner", ".hidden"):
            (tmp_path / name).mkdir()
        refuse(monkeypatch, "scandir", str(tmp_path / ".hidden"))
        assert len(open_source(str(tmp_path), Columns()).parts) == 1
        refuse(monkeypatch, "scandir", str(tmp_path / "inner"))
        with pytest.raises(DataError) as caught:
            open_source(str(tmp_path), Columns())
        assert str(caught.value) == f"{tmp_path / 'inner'}: cannot be read: Permission denied"


def refuse(monkeypatch, name, refused_path):
    real = getattr(os, name)

    def call(path, *arguments, **options):
        if os.fspath(path) == refused_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), refused_path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("name", ["model.safetensors", "pages.tar.gz"])
def test_a_binary_file_is_refused_in_one_line(tmp_path, name):
    path = tmp_path / name
    content = b"\xe8\x03\0\0\0\0\0\0{}\n" * 500
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError) as caught:
        open_source(str(path), Columns())
    assert str(caught.value).startswith(f"{path}: not a data file; give JSON Lines, JSON, CSV, ")
    assert "\n" not in str(caught.value)


def test_text_of_another_encoding_is_not_binary(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(json.dumps(ROWS[0]), encoding="utf-16")
    with pytest.raises(DataError, match="save the file as UTF-8"):
        read_records(path)


def test_a_folder_of_splits(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:1])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[1:3])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", ROWS[3:])

    def of(split):
        return contents(records_of(open_source(str(tmp_path), Columns(), split=split)))

    assert of("train") == EXPECTED[:3]
    assert of("validation") == of("dev") == EXPECTED[3:]
    with pytest.raises(DataError, match="no file is of the split test; give one of train, validation"):
        of("test")


def test_a_link_to_a_folder_is_not_left_out_silently(tmp_path):
    (tmp_path / "part2").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("{}")
    (tmp_path / "data" / ".hidden").symlink_to(tmp_path / "part2")
    open_source(str(tmp_path / "data"), Columns())
    (tmp_path / "data" / "part2").symlink_to(tmp_path / "part2")
    with pytest.raises(DataError, match=r"data/part2: is a link to a folder.* name it with --data"):
        open_source(str(tmp_path / "data"), Columns())


@pytest.mark.parametrize(
    ("files", "split", "problem"),
    [
        ([], "train", "contains no data files"),
        (["a.jsonl", "b.csv"], "train", "holds files of several formats (csv, json lines); name the files"),
        (["a.jsonl"], "test", "no file names a split, so all are train; there is no test"),
    ],
)
def test_ambiguous_folders(tmp_path, files, split, problem):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError) as caught:
        open_source(str(tmp_path), Columns(), split=split)
    assert problem in str(caught.value)


# Datasets of the hub


@pytest.fixture
def table():
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list([{**row, "id": n} for n, row in enumerate(ROWS)])


def test_a_data_set_written_by_save_to_disk(tmp_path, table):
    table.save_to_disk(tmp_path / "one")
    assert contents(records_of(open_source(str(tmp_path / "one"), Columns()))) == EXPECTED
    import datasets

    datasets.DatasetDict(train=table.select([0]), test=table.select([1, 2])).save_to_disk(tmp_path / "two")
    two = open_source(str(tmp_path / "two"), Columns(), split="test")
    assert contents(records_of(two)) == EXPECTED[1:3]
    with pytest.raises(DataError, match="has no split dev; give one of test, train"):
        open_source(str(tmp_path / "two"), Columns(), split="dev")


@pytest.mark.parametrize("name", ["../elsewhere/a.arrow", "/dev/null", "..", "a.arrow"])
def test_a_saved_data_set_names_only_its_own_files(tmp_path, table, name):
    table.save_to_disk(tmp_path / "saved")
    table.save_to_disk(tmp_path / "elsewhere")
    (arrow,) = (tmp_path / "elsewhere").glob("*.arrow")
    arrow.rename(tmp_path / "elsewhere" / "a.arrow")
    state = tmp_path / "saved" / "state.json"
    (tmp_path / "saved" / "a.arrow").mkdir()
    state.write_text(json.dumps({**json.loads(state.read_text()), "_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match=r"not in this folder|not a regular file") as caught:
        open_source(str(tmp_path / "saved"), Columns())
    assert name in str(caught.value)
    (tmp_path / "saved" / "a.arrow").rmdir()
    (tmp_path / "saved" / "a.arrow").symlink_to(tmp_path / "elsewhere" / "a.arrow")  # as in the hub's cache
    if name == "a.arrow":
        assert contents(records_of(open_source(str(tmp_path / "saved"), Columns()))) == EXPECTED


def test_values_that_a_data_set_stores_as_json_are_decoded(tmp_path):
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "Json"):
        pytest.skip("this version has no such feature")
    numbers = dict.fromkeys(("authority_weight", "provenance_entropy"), datasets.Value("float64"))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns, "authority_weight": 0.5, "provenance_entropy": 1.0}] * 3
    features = datasets.Features({"messages": datasets.Json(), **numbers})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "a")
    for limit in (1000, 100):  # a batch at once, and row by row
        source = open_source(str(tmp_path / "a"), Columns(), max_record_bytes=limit)
        assert [row["messages"] for _, row in source.parts[0].rows()] == [turns] * 3


def test_a_data_set_of_the_hub(monkeypatch, table):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return table

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.warns(
        DistrustWarning, match="^dataset owner/name: not here, so it is looked up on .* https://"
    ):
        source = open_source("owner/name", Columns(), split="train[:4]", subset="small", revision="v1")
    assert calls == [(("owner/name", "small"), {"split": "train[:4]", "revision": "v1"})]
    records = records_of(source)
    assert contents(records) == EXPECTED
    assert str(records[2].location) == "owner/name: row 3"
    assert open_source("owner/name", Columns()).parts[0].digest == source.parts[0].digest
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: table.select([0, 1]))
    assert open_source("owner/name", Columns()).parts[0].digest != source.parts[0].digest


def test_a_data_set_that_the_hub_does_not_have(run_python):
    code = """
import sys
from distrust.data import Columns, open_source
from distrust.errors import DataError
try:
    open_source("nobody/nothing", Columns())
except DataError as error:
    print(error)
"""
    completed = run_python(code, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert completed.returncode == 0, completed.stderr
    (line,) = completed.stdout.splitlines()
    assert line.startswith(
        "nobody/nothing: not a file or folder here, and not loaded from the Hugging Face Hub: "
    )


PATHS = (
    *("./none", "../none", "~/none", "a/b/c", "/none", "none/", "a/none/", "a\\none", ".none", "a none"),
    *("none.jsonl", "a/none.parquet", "a/none.safetensors", "none.gguf", "none.jsonl.gz"),
    *(f"a/none{suffix}" for suffix in (".txt", ".md", ".xlsx", ".zip", ".zst", ".arrow", ".gz", ".tar")),
)
BELOW_A_FOLDER = ("models/none", "data/none", "runs/none", "mine/none")


@pytest.mark.parametrize("name", [*PATHS, *BELOW_A_FOLDER])
def test_what_reads_like_a_path_is_never_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", None)
    look_ups = ((DataError, lambda: open_source(name, Columns())), (ModelError, lambda: locate(name)))
    for kind, look_up in look_ups:
        with pytest.raises(kind) as caught:
            look_up()
        problem = f"{name}: no such file or directory"
        if name in BELOW_A_FOLDER:
            folder = name.split("/")[0]
            cause = "mine is a folder here" if folder == "mine" else f"{folder}/… reads like a path"
            problem += f"; not looked up on the hub, because {cause}"
        assert str(caught.value).removeprefix("--model ") == problem


@pytest.mark.parametrize("name", ["imdb", "owner/name", "owner/name-1.5", "0wner/Name_v2.1", "theirs/none"])
def test_every_access_to_the_hub_is_announced_once_and_before(name, monkeypatch):
    """The name of a model and that of a dataset; nothing is said where the user forbids all access."""
    assert locate(name) == (name, False)
    hub._announce_once.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert locate_to_load(name) == (name, False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example")
    with pytest.warns(DistrustWarning) as caught:
        locate_to_load(name)
    (line,) = map(str, (warning.message for warning in caught))
    assert line == (
        f"model {name}: not here, so it is looked up on the hub, https://hub.example; "
        "HF_HUB_OFFLINE=1 uses only what was downloaded before"
    )
    locate_to_load(name)  # a warning would be an error


def test_options_of_the_hub_are_not_for_files(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ConfigError, match="--revision v1: is for datasets of the hub"):
        open_source(str(tmp_path / "a.jsonl"), Columns(), revision="v1")


def test_files_do_not_load_the_datasets_library(run_python, tmp_path):
    write_json_lines(tmp_path / "a.jsonl", ROWS)
    write_separated(",")(tmp_path / "a.csv", ROWS)
    code = """
import sys
from distrust.data import read_records
for path in sys.argv[1:]:
    assert len(read_records(path)) == 4
assert not {"datasets", "pyarrow", "pandas", "torch"} & {name.split(".")[0] for name in sys.modules}
"""
    completed = run_python(code, tmp_path / "a.jsonl", tmp_path / "a.csv")
    assert completed.returncode == 0, completed.stderr


# Examples of a program


def source_of(examples, tmp_path):
    columns = Columns()
    return examples_source(examples, columns, name="examples", temp_folder=tmp_path)


def test_examples_are_validated_like_files(tmp_path):
    assert contents(records_of(source_of(ROWS, tmp_path))) == EXPECTED
    once = source_of((row for row in ROWS), tmp_path)
    assert contents(records_of(once)) == contents(records_of(once)) == EXPECTED
    with pytest.raises(DataError) as caught:
        records_of(source_of([ROWS[0], {"text": 3}], tmp_path))
    assert [problem.split(": ")[0] for problem in caught.value.problems] == ["examples[1]"] * 3


def test_the_digest_of_examples_covers_only_needed_columns(tmp_path):
    def digest(examples):
        return source_of(examples, tmp_path).parts[0].digest

    assert digest(ROWS) == digest(iter(ROWS)) == digest([{**row, "id": object()} for row in ROWS])
    assert digest(ROWS) != digest(ROWS[::-1])
    assert digest(ROWS) != digest([*ROWS[:-1], {**ROWS[-1], "authority_weight": 0.4}])


def test_examples_of_other_libraries(tmp_path, table):
    assert contents(records_of(source_of(table, tmp_path))) == EXPECTED
    assert contents(records_of(source_of(table.to_iterable_dataset(), tmp_path))) == EXPECTED
    numbers = [{**row, "authority_weight": np.float32(row["authority_weight"])} for row in ROWS]
    weights = [weight for _, weight, _ in contents(records_of(source_of(numbers, tmp_path)))]
    assert weights == pytest.approx([row["authority_weight"] for row in ROWS])


@pytest.mark.parametrize(
    ("example", "problem"),
    [
        ("a text", "examples[1]: a string, not a mapping"),
        ({"text": b"a"}, "examples[1]: a value of type bytes"),
    ],
)
def test_invalid_examples(tmp_path, example, problem):
    with pytest.raises(DataError) as caught:
        source_of([ROWS[0], example], tmp_path)
    assert str(caught.value).startswith(problem)


# Column names


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "data.jsonl"
        write_json_lines(path, rows)
        return path

    return write


QUESTION, ANSWER = Message("user", "Why?"), Message("assistant", "So.")
AS_ROLES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
AS_SPEAKERS = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"text": "a"}, Text("a")),
        ({"prompt": "a", "completion": "b"}, Completion("a", "b")),
        ({"messages": AS_ROLES}, Conversation((QUESTION, ANSWER))),
        # The formats of TRL; turns of the prompt carry no loss, not even the assistant's.
        (
            {"prompt": AS_ROLES[:1], "completion": AS_ROLES[1:]},
            Conversation((QUESTION, ANSWER), trained_turns=1),
        ),
        (
            {"prompt": AS_ROLES + AS_ROLES[:1], "completion": AS_ROLES[1:]},
            Conversation((QUESTION, ANSWER, QUESTION, ANSWER), trained_turns=3),
        ),
        ({"conversations": AS_SPEAKERS}, Conversation((QUESTION, ANSWER))),
        ({"messages": AS_SPEAKERS}, Conversation((QUESTION, ANSWER))),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, Completion("Add.\n\n1 2\n\n", "3")),
        ({"instruction": "Hi!", "input": "", "output": "Ho", "history": []}, Completion("Hi!\n\n", "Ho")),
        ({"text": "a", "instruction": "b"}, Text("a")),
    ],
)
def test_the_usual_formats_need_no_option(write, row, content):
    assert read_contents(write(row)) == [content]


def test_columns_are_named(write):
    assert read_contents(write({"body": "a", "text": 3}), text_column="body") == [Text("a")]
    path = write({"text": "all", "q": "a", "completion": "b"})
    assert read_contents(path, prompt_column="q") == [Completion("a", "b")]
    assert read_contents(path, text_column="text") == [Text("all")]
    assert read_contents(write({"chat": AS_SPEAKERS}), messages_column="chat") == [
        Conversation((QUESTION, ANSWER))
    ]


def test_instructions_with_and_without_an_input(write):
    path = write(
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Hi!", "input": "", "output": "Ho"},
    )
    contents = read_contents(path, prompt_column=("instruction", "input"), completion_column="output")
    assert contents == [Completion("Add.\n\n1 2\n\n", "3"), Completion("Hi!\n\n", "Ho")]


def test_alternative_names_of_weights(write):
    columns = columns_of(TrainConfig(authority_weight_column="trust", provenance_entropy_column="bits"))
    source = open_source(str(write({"text": "a", "trust": 0.5, "bits": 2, "authority_weight": 9})), columns)
    assert contents(records_of(source, columns)) == [(Text("a"), 0.5, 2.0)]


@pytest.mark.parametrize(
    ("row", "options", "problem"),
    [
        ({"input": "a", "output": "b"}, {}, "--prompt-column and --completion-column, or with --messages"),
        ({"input": "a", "output": "b"}, {}, '(there is "input", "output")'),
        ({"text": "a"}, {"text_column": "body"}, 'no body; correct --text-column (there is "text")'),
        ({"q": "a"}, {"prompt_column": "q", "completion_column": "r"}, "r: missing, but q is present"),
        ({"body": 3}, {"text_column": "body"}, "body: a number, not a string"),
        ({"messages": AS_ROLES, "conversations": AS_SPEAKERS}, {}, "choose one with --messages-column"),
        ({"text": "a", "messages": AS_ROLES}, {}, "or choose one with --text-column"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, {}, 'conversations[0].from: unknown: "bot"'),
        ({"prompt": AS_ROLES[:1], "completion": AS_ROLES[:1]}, {}, "completion: no assistant turn"),
        ({"prompt": "a", "completion": AS_ROLES[1:]}, {}, "completion: a list, not a string"),
    ],
)
def test_missing_or_ambiguous_columns(write, row, options, problem):
    assert problem in error_of(write(row), **options)


def test_columns_of_a_table_are_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"body": "a", "chat": AS_ROLES, "n": 1}])
    assert read_contents(tmp_path / "a.parquet", text_column="body") == [Text("a")]
    assert read_contents(tmp_path / "a.parquet", messages_column="chat") == [Conversation((QUESTION, ANSWER))]
    assert '(there is "body", "chat", "n")' in error_of(tmp_path / "a.parquet")
