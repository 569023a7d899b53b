"""The command ``distrust weigh``."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distrust.atomic import atomic_file
from distrust.bundled import CORPUS, PROVENANCE_TABLE
from distrust.cli import main
from distrust.data import read_records
from distrust.errors import WriteFailed

ROOT = Path(__file__).parent.parent.parent
PEPS = ROOT.parent / "shared" / "data" / "documents" / "peps.jsonl"
DOCS = ROOT / "docs" / "provenance.md"
TABLE = '[ranks]\nlab = 0.2\n"press office" = 0.6\n'
CHAIN = [{"kind": "report", "id": "a", "share": 1}, {"kind": "report", "id": "b", "share": 1}]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(path):
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.toml"
    path.write_text(TABLE, encoding="utf-8")
    return path


@pytest.fixture
def raw(tmp_path):
    """Records without w and H: both are computed."""
    rows = [
        {"text": "one", "institutional_rank": "lab", "citation_count": 0, "evidence": CHAIN, "source": "lab"},
        {"text": "two", "institutional_rank": "press office", "citation_count": 99, "evidence": []},
        {"text": "three", "institutional_rank": 0, "citation_count": 9, "evidence": CHAIN, "source": 7},
    ]
    return write(tmp_path / "raw.jsonl", rows)


# Output


def test_both_columns_are_written_and_other_fields_kept(distrust, raw, table, tmp_path):
    out = tmp_path / "out.jsonl"
    result = distrust("weigh", raw, "--table", table, "--out", out)
    assert (result.code, result.err) == (0, "")
    source, output = read(raw), read(out)
    scores = [(row.pop("authority_weight"), row.pop("provenance_entropy")) for row in output]
    assert scores == [(0.2, 1.0), (0.99, 0.0), (0.2, 1.0)]
    assert output == source
    assert [list(row) for row in output] == [list(row) for row in source]
    assert len(read_records(out)) == 3
    assert "w: 3 computed\nH: 3 computed\n" in result.out
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "raw.jsonl", "table.toml"]

    again = distrust("weigh", out, "--table", table, "--strict", "--json")
    assert again.code == 0
    for check in json.loads(again.out)["check"].values():
        assert (check["checked"], check["differing"], check["computed"]) == (3, 0, 0)


#: Characters, numbers and blanks that parsing and printing would change.
ODD = (
    '{ "text":"\\u00e4 ä \\ud83d\\ude00","a": 1.0,  "b":1e5,"c":123456789012345678901234567890, "d":null, '
    '"e" : [0.10, {"authority_weight": 3}],"institutional_rank":0.5 ,"citation_count":0, "evidence":[] %s}'
)


@pytest.mark.parametrize(
    ("members", "end"),
    [
        ("", '"evidence":[], "authority_weight": 0.5, "provenance_entropy": 0.0}'),
        (', "prov_entropy":null, "z":1', '"prov_entropy":0.0, "z":1, "authority_weight": 0.5}'),
        (',"auth_weight": 5e-1,"provenance_entropy" :0 ', ',"auth_weight": 5e-1,"provenance_entropy" :0 }'),
        (', "authority\\u005fweight": null', '"authority\\u005fweight": 0.5, "provenance_entropy": 0.0}'),
    ],
)
def test_a_record_keeps_its_exact_text(distrust, tmp_path, members, end):
    data, out = tmp_path / "odd.jsonl", tmp_path / "out.jsonl"
    data.write_text("\ufeff" + ODD % members + "\r\n\n" + ODD % members + "\n", encoding="utf-8")
    assert distrust("weigh", data, "--out", out).code == 0
    first, second = out.read_text("utf-8").splitlines()
    assert first == second
    unchanged = (ODD % members).split('"evidence":[]')[0]
    assert first.startswith(unchanged)
    assert first.endswith(end), first


names = st.text(st.characters(codec="utf-8"), max_size=6).filter(
    lambda name: name not in ("text", "source", "title")
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.dictionaries(names, values, max_size=4), min_size=1, max_size=4),
    ascii_only=st.booleans(),
    as_list=st.booleans(),
    data=st.data(),
)
def test_any_record_is_written_unchanged(distrust, tmp_path, rows, ascii_only, as_list, data):
    stated = st.sampled_from(
        [{}, {"authority_weight": 0.25}, {"auth_weight": None}, {"provenance_entropy": 2, "prov_entropy": 2}]
    )
    rows = [
        {
            **row,
            "text": "t",
            "institutional_rank": 0.5,
            "citation_count": 3,
            "evidence": [],
            **data.draw(stated),
        }
        for row in rows
    ]
    path, out = tmp_path / ("any.json" if as_list else "any.jsonl"), tmp_path / "any-out.jsonl"
    if as_list:
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=1)
    else:
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert distrust("weigh", path, "--out", out, "--force").code == 0
    w_names, h_names = ("authority_weight", "auth_weight"), ("provenance_entropy", "prov_entropy")
    written = out.read_bytes().decode().split("\n")
    assert written.pop() == ""
    for row, line in zip(rows, written, strict=True):
        output = json.loads(line)
        assert [name for name in output if name in row] == list(row)
        assert set(output) - set(row) <= {"authority_weight", "provenance_entropy"}
        for name in row:
            if row[name] is None and name in w_names:
                assert output[name] > 0.5
            else:
                assert output[name] == row[name]
        assert any(output.get(name) is not None for name in w_names)
        assert any(output.get(name) is not None for name in h_names)
    again = json.loads(distrust("weigh", out, "--json").out)
    differ = [check["differing"] for check in again["check"].values()]
    stated_w = sum(row.get("authority_weight") == 0.25 for row in rows)
    assert differ == [stated_w, sum("prov_entropy" in row for row in rows)]


def test_parquet_keeps_types_and_formats_convert(distrust, raw, table, tmp_path):
    typed = pa.table(
        {
            "text": ["a", "b"],
            "day": pa.array([0, 1], pa.date32()),
            "small": pa.array([1, None], pa.int8()),
            "auth_weight": pa.array([0.25, None], pa.float32()),
            "institutional_rank": pa.array(["lab", "lab"]).dictionary_encode(),
            "citation_count": [0, 0],
            "evidence": [[], [{"kind": "report", "share": 1.0}]],
        }
    )
    pq.write_table(typed, tmp_path / "typed.parquet")
    out = tmp_path / "out.parquet"
    assert distrust("weigh", tmp_path / "typed.parquet", "--table", table, "--out", out).code == 0
    output = pq.read_table(out)
    assert output["auth_weight"].to_pylist() == [0.25, 0.2]
    assert output["provenance_entropy"].to_pylist() == [0.0, 0.0]
    assert output.column_names == [*typed.column_names, "provenance_entropy"]
    for name in ("text", "day", "small", "institutional_rank", "citation_count", "evidence"):
        assert output[name].to_pylist() == typed[name].to_pylist()
        assert output[name].type == typed[name].type

    as_json = distrust("weigh", tmp_path / "typed.parquet", "--table", table, "--out", tmp_path / "x.jsonl")
    assert (as_json.code, as_json.err.count("\n")) == (1, 1)
    assert 'typed.parquet: row 1: "day": JSON cannot represent' in as_json.err

    plain = typed.drop_columns("day").set_column(3, "institutional_rank", pa.array(["lab", "lab"]))
    assert sorted(plain.column_names) == sorted({*typed.column_names} - {"day"})
    pq.write_table(plain, tmp_path / "plain.parquet")
    both = ("weigh", raw, tmp_path / "plain.parquet", "--table", table, "--out")
    assert distrust(*both, tmp_path / "both.jsonl.gz").code == 0
    assert [row["text"] for row in read(tmp_path / "both.jsonl.gz")] == ["one", "two", "three", "a", "b"]
    mixed = distrust(*both, tmp_path / "both.parquet")  # a rank is a name or a number in one of them
    assert (mixed.code, mixed.err.count("\n")) == (1, 1)
    assert 'cannot be one table: column "institutional_rank": ' in mixed.err
    assert not (tmp_path / "both.parquet").exists()

    alike = [{**row, "institutional_rank": "lab", "source": str(i)} for i, row in enumerate(read(raw))]
    write(tmp_path / "c.jsonl", alike)
    assert distrust(*both[:1], tmp_path / "c.jsonl", *both[2:], tmp_path / "c.parquet").code == 0
    output = pq.read_table(tmp_path / "c.parquet")
    assert output["source"].to_pylist() == ["0", "1", "2", None, None]
    assert output["evidence"].to_pylist()[0] == CHAIN
    assert output["provenance_entropy"].to_pylist() == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert output["auth_weight"].to_pylist() == [0.2, 0.6, 0.4, 0.25, 0.2]
    assert len(read_records(tmp_path / "c.parquet")) == 5


def test_csv(distrust, table, tmp_path):
    path, out = tmp_path / "a.csv", tmp_path / "out.jsonl"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["text", "authority_weight", "institutional_rank", "citation_count", "evidence", "code"]
        )
        rows.writerow(["a", "", "lab", "9", json.dumps(CHAIN), "007"])
        rows.writerow(["b", "0.50", "", "", "[]", ""])
    assert distrust("weigh", path, "--table", table, "--out", out).code == 0
    first, second = read(out)
    assert list(first) == [
        "text",
        "authority_weight",
        "institutional_rank",
        "citation_count",
        "evidence",
        "code",
        "provenance_entropy",
    ]
    assert (first["authority_weight"], first["provenance_entropy"], first["code"]) == (0.4, 1.0, "007")
    assert (second["authority_weight"], second["citation_count"], second["code"]) == (0.5, "", "")


# Checks


def test_stated_values_are_checked_and_kept_by_default(distrust, table, tmp_path):
    ingredients = {"text": "t", "institutional_rank": "lab", "citation_count": 0, "evidence": CHAIN}
    rows = [
        {**ingredients, "authority_weight": 0.204, "provenance_entropy": 1.04},
        {**ingredients, "authority_weight": 0.3, "provenance_entropy": 1},
        {**ingredients, "authority_weight": 0.9, "provenance_entropy": 0},
        {"text": "t", "authority_weight": 0.7, "provenance_entropy": 3},
        {**ingredients, "institutional_rank": "?", "authority_weight": 0.1, "provenance_entropy": 1},
    ]
    data, out = write(tmp_path / "own.jsonl", rows), tmp_path / "out.jsonl"
    result = distrust("weigh", data, "--table", table, "--out", out)
    assert (result.code, result.err) == (0, "")
    assert out.read_bytes() == data.read_bytes(), "no value was missing"
    assert "w: 3 checked: 2 differ by more than 0.005 (kept; --recompute replaces them)" in result.out
    first, second = (line for line in result.out.splitlines() if "in the data, 0.2 computed" in line)
    assert first == f"   {data}:3: 0.9 in the data, 0.2 computed"
    assert second.startswith(f"   {data}:2: 0.3 ")
    assert (
        "w: 2 not checked: 1 with no institutional_rank and no citation_count, 1 with "
        f"institutional_rank not in [ranks] of {table}"
    ) in result.out
    assert "H: 4 checked: 1 differs by more than 0.05 bits" in result.out
    assert "H: 1 not checked: 1 with no evidence" in result.out

    assert distrust("weigh", data, "--table", table, "--strict").code == 1
    wide = distrust("weigh", data, "--table", table, "--strict", "--tolerance-w", 1, "--tolerance-h", 1)
    assert wide.code == 0

    result = distrust("weigh", data, "--table", table, "--out", out, "--force", "--recompute")
    assert result.code == 0
    assert [row["authority_weight"] for row in read(out)] == [0.2, 0.2, 0.2, 0.7, 0.1]
    assert [row["provenance_entropy"] for row in read(out)] == [1.0, 1, 1.0, 3, 1]
    assert [row["text"] for row in read(data)] == ["t"] * 5, "the input is never written to"


def test_defaults_apply_without_ingredients(distrust, tmp_path):
    data = write(tmp_path / "a.jsonl", [{"text": "t"}, {"text": "u", "authority_weight": 0.1}])
    flags = ("--default-authority-weight", 0.5, "--default-provenance-entropy", 2)
    shown = json.loads(distrust("weigh", data, "--json", *flags).out)
    assert shown["check"]["authority_weight"]["defaulted"] == 1
    assert shown["check"]["provenance_entropy"]["defaulted"] == 2
    assert shown["quantiles"]["authority_weight"] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_all_errors_are_reported_at_once_and_nothing_is_written(distrust, table, tmp_path):
    valid = {"text": "t", "institutional_rank": "lab", "citation_count": 1, "evidence": CHAIN}
    rows = [
        valid,
        {**valid, "institutional_rank": "tabloid"},
        {**valid, "citation_count": None},
        {**valid, "evidence": [*CHAIN, {"kind": "report", "share": -1}], "citation_count": "x"},
        {**valid, "authority_weight": 1.5},
    ]
    data = write(tmp_path / "wrong.jsonl", rows)
    with data.open("a", encoding="utf-8") as file:
        file.write("{not json\n")
    out, figure = tmp_path / "out.jsonl", tmp_path / "p.png"
    result = distrust("weigh", data, "--table", table, "--out", out, "--plot", figure)
    assert (result.code, result.out) == (1, "")
    headline, *lines = result.err.splitlines()
    assert headline == f"distrust: {data}: 5 of 6 records are wrong"
    locations = [line.removeprefix(f"{data}:").split(": ")[:2] for line in lines]
    assert locations == [
        ["2", "institutional_rank"],
        ["3", "citation_count"],
        ["4", "citation_count"],
        ["4", "evidence[2].share"],
        ["5", "authority_weight"],
        ["6", "invalid JSON"],
    ]
    assert not out.exists()
    assert not figure.exists()


def test_a_weight_that_overflows_names_its_record(distrust, tmp_path):
    rows = [{"text": "t", "authority_weight": 0.1, "provenance_entropy": h} for h in (1.0, 1e200)]
    data = write(tmp_path / "a.jsonl", rows)
    result = distrust("weigh", data)
    assert (result.code, result.out, result.err.count("\n")) == (1, "", 1)
    assert f"{data}:2: its weight overflows" in result.err


def test_a_replaced_file_keeps_its_permissions(distrust, raw, table, tmp_path):
    out = tmp_path / "private.jsonl"
    out.touch(mode=0o600)
    assert distrust("weigh", raw, "--table", table, "--out", out, "--force").code == 0
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert out.stat().st_size > 0


def test_concurrent_writers_of_one_file_all_succeed(tmp_path):
    """One may remove the unlocked temporary file of another, which then creates it again."""

    def write_often(number: int) -> None:
        for _ in range(100):
            with atomic_file(tmp_path / "one", force=True) as file:
                file.write(bytes([number]) * 100)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(write_often, number) for number in range(4)]:
            future.result()
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert len(set((tmp_path / "one").read_bytes())) == 1


# Display


def test_the_printed_summary(distrust, raw, table, tmp_path):
    result = distrust("weigh", raw, "--table", table, "--top", 2)
    assert (result.code, result.err) == (0, "")
    assert f"heaviest{'':{len(str(raw))}}" in result.out
    assert f"  {raw}:1   0.200   1.000" in result.out
    assert "(none)" in result.out
    assert result.out.splitlines()[-1].startswith("effective sample size 3 of 3")

    shown = json.loads(distrust("weigh", raw, "--table", table, "--json", "--weighting", "off").out)
    assert shown["quantiles"]["weight"] == [1.0] * 5
    assert shown["effective_examples"] == 3
    assert [(c["name"], c["examples"]) for c in shown["classes"]] == [("lab", 1), ("", 1), ("7", 1)]
    assert "tokens" not in shown
    u = 1 + 0.6 * 2.7 * (math.log(0.8 + 1e-8) + 1) ** 2
    shown = json.loads(distrust("weigh", raw, "--table", table, "--json").out)
    assert shown["heaviest"][0]["weight"] == pytest.approx(u)
    assert shown["heaviest"][0]["where"] == f"{raw}:1"
    shown = json.loads(distrust("weigh", raw, "--table", table, "--json", "--max-ratio", 1.5).out)
    assert shown["quantiles"]["weight"][-1] == 1.5


def test_control_characters_of_the_data_are_escaped(distrust, table, tmp_path):
    hostile = "\x1b[2J\u202e\x07$x_1$<&"
    row = {"text": "t", "title": hostile, "source": hostile, "authority_weight": 0.1, "provenance_entropy": 1}
    data = write(tmp_path / "a.jsonl", [row, {**row, "source": "\ud800", "title": "x" * 10_000 + "\n"}])
    result = distrust("weigh", data, "--plot", tmp_path / "p.svg")
    assert result.code == 0
    assert all(letter.isprintable() or letter == "\n" for letter in result.out)
    assert max(map(len, result.out.splitlines())) < 300
    figure = (tmp_path / "p.svg").read_text("utf-8")
    assert "\x1b" not in figure
    assert "&lt;&amp;" in figure


def test_the_figure(distrust, raw, table, tmp_path):
    figure = tmp_path / "p.SVG"
    command = ("weigh", raw, "--table", table, "--plot", figure)
    result = distrust(*command)
    assert (result.code, result.err) == (0, "")
    first = figure.read_bytes()
    assert first.startswith(b"<?xml")
    assert distrust(*command).code == 2
    assert distrust(*command, "--force").code == 0
    assert figure.read_bytes() == first, "the same figure is the same bytes"
    equal = ("--weighting", "off", "--plot", tmp_path / "equal.png")
    assert distrust("weigh", raw, "--table", table, *equal).code == 0, "equal weights have a figure too"
    assert (tmp_path / "equal.png").read_bytes().startswith(b"\x89PNG")


def test_the_printed_table_can_be_used(distrust, raw, tmp_path):
    printed = distrust("weigh", "--print-table").out
    assert printed == PROVENANCE_TABLE.read_text("utf-8")
    assert all("#" in line for line in printed.splitlines() if line.strip())
    custom = tmp_path / "own.toml"
    custom.write_text(printed.replace("[evidence]", "lab = 0.2\n'press office' = 0.6\n[evidence]"), "utf-8")
    assert distrust("weigh", raw, "--table", custom).code == 0


def test_the_docs_show_the_default_table():
    (shown,) = re.findall(r"```toml\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
    assert PROVENANCE_TABLE.read_text("utf-8").endswith(f"\n\n{shown}")


# Errors


def test_usage_errors_are_one_line(distrust, raw, table, tmp_path):
    (tmp_path / "existing.jsonl").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "link.jsonl").symlink_to(raw)
    os.link(raw, tmp_path / "hard.jsonl")
    content = raw.read_bytes()
    cases = {
        (): "",
        ("--out", tmp_path / "out.csv"): "give a name that ends in .jsonl, .jsonl.gz or .parquet",
        ("--out", tmp_path / "existing.jsonl"): "exists already; give another name, or --force",
        ("--out", tmp_path / "folder.jsonl", "--force"): "exists already, and is not a file",
        ("--out", raw, "--force"): "is an input, and is never replaced",
        ("--out", tmp_path / "link.jsonl", "--force"): "is an input, and is never replaced",
        ("--out", tmp_path / "hard.jsonl", "--force"): "is an input, and is never replaced",
        ("bundled", "--out", CORPUS, "--force"): "is an input, and is never replaced",
        ("--plot", tmp_path / "p.pdf"): "give a name that ends in .png or .svg",
        ("--alpha", 5): "--alpha is 5.0: give 2.3 to 3.0",
        ("--max-ratio", 0): "--max-ratio is 0.0: give 1 or more",
        ("--tolerance-w", "nan"): "--tolerance-w is nan: give 0 or more",
        ("--top", -1): "--top is -1: give 0 or more",
        ("--table", tmp_path / "none.toml"): "none.toml: no such file or directory",
    }
    for flags, message in cases.items():
        result = distrust("weigh", raw, "--table", table, *flags)
        assert result.code == (0 if not message else 1 if "not a file" in message else 2), result.err
        assert message in result.err
        assert result.err.count("\n") == bool(message)
    assert raw.read_bytes() == content
    assert (tmp_path / "existing.jsonl").read_text() == "mine"
    assert distrust("weigh").code == 2
    assert distrust("weigh", tmp_path / "none.jsonl").err.count("\n") == 1
    inside = distrust("weigh", tmp_path, "--out", tmp_path / "out.jsonl")
    assert inside.code == 2
    assert "is in the input folder" in inside.err
    missing = distrust("weigh", raw, "--table", table, "--out", tmp_path / "no" / "out.jsonl")
    assert (missing.code, missing.err.count("\n")) == (1, 1)
    assert missing.err.endswith(f"{tmp_path / 'no'}: no such file or directory; make that folder first\n")
    (tmp_path / "empty.jsonl").touch()
    empty = distrust("weigh", raw, tmp_path / "empty.jsonl", "--table", table)
    assert (empty.code, empty.err.count("\n")) == (1, 1)
    assert "contains no records" in empty.err


def test_if_one_output_fails_neither_is_written(distrust, raw, table, tmp_path):
    figure = tmp_path / "p.png"
    flags = ("--table", table, "--plot", figure, "--out", tmp_path / f"{'x' * 250}.jsonl")
    result = distrust("weigh", raw, *flags)
    assert (result.code, result.out) == (1, "")
    assert "not written: File name too long" in result.err
    assert sorted(os.listdir(tmp_path)) == ["raw.jsonl", "table.toml"]


def test_a_terminal_without_unicode(tmp_path):
    row = {"text": "t", "title": "日本 ä", "authority_weight": 0.1, "provenance_entropy": 1}
    data = write(tmp_path / "a.jsonl", [row])
    completed = subprocess.run(
        [sys.executable, "-m", "distrust", "weigh", data],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        check=False,
    )
    assert (completed.returncode, completed.stderr) == (0, b"")
    assert b"\\u65e5\\u672c \xe4" in completed.stdout
    assert b"  ####" in completed.stdout


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz", "out.parquet"])
def test_a_full_disk_leaves_the_existing_file(tmp_path, name):
    """A limit on the file size stops the write: the existing file is unchanged."""
    rows = [
        {"text": os.urandom(60).hex(), "authority_weight": 0.1, "provenance_entropy": 1} for _ in range(2000)
    ]
    data, out = write(tmp_path / "a.jsonl", rows), tmp_path / name
    out.write_text("existing")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    completed = subprocess.run(
        [sys.executable, "-m", "distrust", "weigh", data, "--out", out, "--force"],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    assert (completed.returncode, completed.stdout) == (1, "")
    assert completed.stderr == f"distrust: {out}: not written: File too large\n"
    assert out.read_text() == "existing"
    assert sorted(os.listdir(tmp_path)) == sorted(["a.jsonl", name])


def test_the_leftovers_of_a_killed_writer_are_removed(distrust, tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from distrust.atomic import atomic_file
with atomic_file(Path(sys.argv[1]), force=False) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    out = tmp_path / "out"
    completed = subprocess.run([sys.executable, "-c", code, out], check=False)
    assert completed.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover != out
    with atomic_file(out, force=False) as file:
        file.write(b"complete")
        full = OSError(28, "No space left on device")
        with pytest.raises(WriteFailed, match="not written: No space"), atomic_file(out, force=False):
            raise full
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"complete"]


def test_a_file_that_changes_while_it_is_read_gives_no_output(distrust, raw, table, tmp_path, monkeypatch):
    from distrust.data.provenance import write_dataset

    real = write_dataset.atomic_file

    def append_and_open(path, **options):
        with raw.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"text": "late"}) + "\n")
        return real(path, **options)

    monkeypatch.setattr(write_dataset, "atomic_file", append_and_open)
    result = distrust("weigh", raw, "--table", table, "--out", tmp_path / "out.jsonl")
    assert result.code == 1
    assert "it changed while it was read; start again" in result.err
    assert not (tmp_path / "out.jsonl").exists()


def test_memory_does_not_grow_with_the_data(tmp_path):
    """Sixteen times the data need some bytes more per record, far less than the records."""
    code = """
import resource, sys
from distrust.cli import main
assert main(["weigh", *sys.argv[1:]]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1 if sys.platform != "darwin" else 1024))
"""

    def peak(name, times):
        row = json.dumps({"text": "word " * 1000, "authority_weight": 0.1, "provenance_entropy": 1})
        data = tmp_path / name
        with data.open("w", encoding="utf-8") as file:
            for _ in range(times):
                file.write(row + "\n")
        completed = subprocess.run(
            [sys.executable, "-c", code, data, "--out", f"{data}.jsonl"],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(completed.stdout.splitlines()[-1])

    assert peak("large", 8000) - peak("small", 500) < 8 * 1024, "KiB, for 40 MB of data"


# Real data


def test_the_bundled_corpus(distrust):
    result = distrust("weigh", "bundled")
    assert (result.code, result.err) == (0, "")
    assert str(CORPUS) in result.out


@pytest.fixture(scope="module")
def peps():
    if not PEPS.is_file():
        pytest.skip(f"no {PEPS}")
    return PEPS


PEPS_TABLE = ROOT / "examples" / "provenance_peps.toml"


def test_the_example_s_table_gives_the_weights_of_real_documents(distrust, peps, tmp_path):
    flags = ("--table", PEPS_TABLE, "--source-column", "status")
    shown = json.loads(distrust("weigh", peps, *flags, "--json").out)
    w, h = shown["check"]["authority_weight"], shown["check"]["provenance_entropy"]
    assert (w["checked"], w["differing"], h["checked"]) == (300, 0, 300)
    for difference in h["largest"]:  # only if the list leaves out references to unknown numbers
        line = int(difference["where"].rsplit(":", 1)[1])
        row = json.loads(peps.read_text("utf-8").split("\n")[line - 1])
        assert sum(item["share"] for item in row["evidence"]) < 0.99
    assert h["differing"] == len(h["largest"]) == 1

    out = tmp_path / "peps.jsonl"
    assert distrust("weigh", peps, *flags, "--recompute", "--out", out).code == 0
    again = json.loads(distrust("weigh", out, *flags, "--json", "--strict").out)
    assert [check["differing"] for check in again["check"].values()] == [0, 0]
    weights = ("authority_weight", "provenance_entropy")
    for source, output in zip(read(peps), read(out), strict=True):
        assert list(source) == list(output)
        assert all(source[name] == output[name] for name in source if name not in weights)
    assert len(read_records(out)) == 300


def test_the_docs_show_what_the_command_prints(distrust, peps, tmp_path):
    data = tmp_path / "peps.jsonl"
    data.write_bytes(peps.read_bytes())
    flags = ("--table", PEPS_TABLE, "--source-column", "status", "--top", 3)
    printed = distrust("weigh", data, *flags).out.splitlines()
    shown = DOCS.read_text("utf-8").split("--plot weigh.png\n")[-1].split("\n```")[0].splitlines()
    assert shown[-1] == "figure weigh.png"
    squeezed = [" ".join(line.replace(str(data), "peps.jsonl").split()) for line in printed]
    assert squeezed == [" ".join(line.split()) for line in shown[:-1]]


def test_removed_columns_are_computed_again(distrust, peps, tmp_path):
    rows = read(peps)
    for row in rows:
        del row["authority_weight"], row["provenance_entropy"]
    bare, out = write(tmp_path / "bare.jsonl", rows), tmp_path / "out.parquet"
    result = distrust("weigh", bare, "--table", PEPS_TABLE, "--out", out)
    assert (result.code, result.err) == (0, "")
    assert "w: 300 computed\nH: 300 computed\n" in result.out
    for source, output in zip(read_records(peps), read_records(out), strict=True):
        assert abs(source.authority_weight - output.authority_weight) < 0.005
        assert source.content == output.content


def test_the_output_can_be_trained_on(folder, table, tmp_path):
    from distrust.testing.models import train_arguments

    rows = read(folder / "data.jsonl")
    for row in rows:
        del row["authority_weight"], row["provenance_entropy"]
        row.update(institutional_rank="lab", citation_count=3, evidence=CHAIN)
    bare, out = write(tmp_path / "bare.jsonl", rows), tmp_path / "weighed.jsonl.gz"
    assert main(["weigh", str(bare), "--table", str(table), "--out", str(out)]) == 0
    run = train_arguments(folder, tmp_path / "run", "--data", out, "--max-steps", 1)
    assert main(run) == 0
