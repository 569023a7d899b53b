"""Reads records from valid and invalid files."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust import TrainConfig
from distrust.data import RecordReader, check_records, columns_of, open_source, read_records
from distrust.data.records import Completion, Conversation, Location, Message, Record, Text
from distrust.errors import ConfigError, DataError

SOURCE = {"authority_weight": 0.2, "provenance_entropy": 3.5}
USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="data.jsonl"):
        path = tmp_path / name
        encoded = [
            line
            if isinstance(line, bytes)
            else line.encode()
            if isinstance(line, str)
            else json.dumps(line).encode()
            for line in lines
        ]
        path.write_bytes(b"".join(line + b"\n" for line in encoded))
        return path

    return write


def problems_of(path, **defaults):
    with pytest.raises(DataError) as caught:
        read_records(path, **defaults)
    return [problem.removeprefix(f"{path}:") for problem in caught.value.problems]


def problem_of(write, record, **defaults):
    (problem,) = problems_of(write(record), **defaults)
    return problem


def test_the_three_kinds_of_content(write):
    path = write(
        {"text": "a text", **SOURCE},
        {"prompt": "1 + 1 =", "completion": " 2", **SOURCE},
        {"messages": [{"role": "system", "content": ""}, USER, ASSISTANT], **SOURCE},
    )
    assert read_records(path) == [
        Record(Location(str(path), 1), 0.2, 3.5, Text("a text")),
        Record(Location(str(path), 2), 0.2, 3.5, Completion("1 + 1 =", " 2")),
        Record(
            Location(str(path), 3),
            0.2,
            3.5,
            Conversation((Message("system", ""), Message("user", "Why?"), Message("assistant", "Because."))),
        ),
    ]


def test_a_location_is_written_as_editors_write_it():
    assert str(Location("data/a.jsonl", 7)) == "data/a.jsonl:7"


def test_other_fields_nulls_and_other_names(write):
    path = write(
        {"id": 7, "title": None, "evidence": [{"share": 1.0}], "text": "a", **SOURCE},
        {"text": None, "messages": None, "prompt": "p", "completion": "c", **SOURCE},
        {"text": "b", "auth_weight": 0, "prov_entropy": 1},
        {
            "text": "c",
            "auth_weight": 0.5,
            "authority_weight": 0.5,
            "prov_entropy": 1,
            "provenance_entropy": 1.0,
        },
    )
    first, second, third, fourth = read_records(path)
    assert first.content == Text("a")
    assert second.content == Completion("p", "c")
    assert (third.authority_weight, third.provenance_entropy) == (0.0, 1.0)
    assert isinstance(third.authority_weight, float)
    assert (fourth.authority_weight, fourth.provenance_entropy) == (0.5, 1.0)


def test_blank_lines_a_byte_order_mark_and_carriage_returns(write):
    line = json.dumps({"text": "ä\u2028ö", **SOURCE}, ensure_ascii=False).encode()
    path = write(b"\xef\xbb\xbf" + line + b"\r", b"", b"  \t\r", line)
    records = read_records(path)
    assert [record.location.line for record in records] == [1, 4]
    assert [record.content for record in records] == [Text("ä\u2028ö")] * 2


def test_the_last_line_needs_no_line_feed(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": "a", **SOURCE}))
    assert len(read_records(path)) == 1


def test_a_default_applies_to_records_without_a_value(write):
    path = write({"text": "a", "authority_weight": 0.1}, {"text": "b", "provenance_entropy": 2})
    first, second = read_records(path, default_authority_weight=0.7, default_provenance_entropy=0.5)
    assert (first.authority_weight, first.provenance_entropy) == (0.1, 0.5)
    assert (second.authority_weight, second.provenance_entropy) == (0.7, 2.0)


@pytest.mark.parametrize(
    "defaults", [{"default_authority_weight": 1.0}, {"default_provenance_entropy": -1.0}]
)
def test_a_default_out_of_range_is_named(write, defaults):
    with pytest.raises(ConfigError, match=next(iter(defaults)).replace("_", "-")):
        read_records(write({"text": "a"}), **defaults)


@given(
    st.lists(
        st.tuples(
            st.text(min_size=1).filter(str.strip), st.floats(0, 0.99), st.floats(0, 1e6), st.booleans()
        ),
        min_size=1,
        max_size=10,
    )
)
def test_any_json_text_is_read_exactly(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "data.jsonl"
    lines = [
        json.dumps({"text": text, "authority_weight": w, "provenance_entropy": h}, ensure_ascii=escaped)
        for text, w, h, escaped in rows
    ]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
    read = [(r.content.text, r.authority_weight, r.provenance_entropy) for r in read_records(path)]
    assert read == [row[:3] for row in rows]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "a" "b"}', "invalid JSON: expecting ',' delimiter; "),
        (b'{"text": "a" "b"}', "on one line (column 14)"),
        (b"[", "invalid JSON: expecting value; "),
        (b'["a"]', "a list, not a JSON object"),
        (b"null", "null, not a JSON object"),
        (b'{"text": "\xff"}', "invalid UTF-8; save the file as UTF-8 (byte 11)"),
        (b'{"text": "a", "text": "b"}', '"text": appears twice'),
        (b'{"n": ' + b"1" * 5000 + b"}", "a number too long"),
        (b'{"n": ' + b"[" * 100_000, "nested too deep"),
    ],
)
def test_invalid_lines(write, line, problem):
    message = problem_of(write, line)
    assert message.startswith("1: ")
    assert problem in message


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"title": "x"}, "no text, no prompt + completion, and no messages"),
        ({"text": "a", "messages": [USER, ASSISTANT]}, "text and messages in one record"),
        (
            {"text": "a", "completion": "b"},
            "text and prompt + completion in one record; keep one, or choose one with --text-column text or "
            "--completion-column completion",
        ),
        (
            {"text": "a", "instruction": "b", "input": "", "output": "c"},
            "text and instruction + output in one record; keep one, or choose one with --text-column text or "
            "--prompt-column instruction input --completion-column output",
        ),
        (
            {"conversations": [USER, ASSISTANT], "prompt": "a", "completion": "b"},
            "prompt + completion and messages in one record; keep one, or choose one with --prompt-column "
            "prompt --completion-column completion or --messages-column conversations",
        ),
        ({"prompt": "a"}, "completion: missing, but prompt is present"),
        ({"completion": "a"}, "prompt: missing, but completion is present"),
        ({"text": 7}, "text: a number, not a string"),
        ({"prompt": ["a"], "completion": "b"}, "prompt: a list, not a string"),
        ({"prompt": "a", "completion": False}, "completion: a boolean, not a string"),
        ({"text": ""}, "text: is empty"),
        ({"text": " \n"}, "text: is empty"),
        ({"prompt": "a", "completion": ""}, "completion: is empty"),
        ({"text": "a\ud800b"}, "text: half of a surrogate pair (\\ud800) at character 2"),
        ({"messages": []}, "messages: empty"),
        ({"messages": "hello"}, "messages: a string, not a list"),
        ({"messages": [USER, "hello"]}, "messages[1]: a string, not an object"),
        ({"messages": [{"content": "a"}]}, "messages[0].role: missing"),
        ({"messages": [{"role": "bot", "content": "a"}]}, 'messages[0].role: unknown: "bot"'),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role: unknown"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: missing"),
        ({"messages": [{"role": "user", "content": 7}, ASSISTANT]}, "messages[0].content: a number"),
        ({"messages": [USER]}, "messages: no assistant turn"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages[1].content: is empty"),
        ({"instruction": "Add."}, "output: missing, but instruction is present"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "history: cannot be honoured"),
        ({"text": "a", "images": ["b.png"]}, "images: cannot be honoured with text"),
    ],
)
def test_invalid_content(write, fields, problem):
    message = problem_of(write, {**fields, **SOURCE})
    assert message.startswith(f"1: {problem}")
    assert "; " in message  # the remedy


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"authority_weight": None}, "authority_weight: missing; add it, or give --default-authority-weight"),
        ({"authority_weight": "0.5"}, 'authority_weight: must be a number, not a string ("0.5")'),
        ({"authority_weight": True}, "authority_weight: must be a number, not a boolean (true)"),
        ({"authority_weight": float("nan")}, "authority_weight: NaN is outside [0, 0.99]"),
        ({"authority_weight": -0.1}, "authority_weight: -0.1 is outside [0, 0.99]"),
        ({"authority_weight": 10**400}, "authority_weight: a huge integer is outside [0, 0.99]"),
        (
            {"authority_weight": 1},
            "authority_weight: 1 is above 0.99, the largest authority weight; write 0.99",
        ),
        ({"authority_weight": 0.995}, "authority_weight: 0.995 is above 0.99"),
        ({"authority_weight": 1.5}, "authority_weight: 1.5 is outside [0, 0.99]"),
        ({"auth_weight": 0.3}, "authority_weight: differs from its other name, auth_weight (0.2 and 0.3)"),
        ({"authority_weight": None, "auth_weight": 7}, "auth_weight: 7 is outside"),
        (
            {"provenance_entropy": None},
            "provenance_entropy: missing; add it, or give --default-provenance-entropy",
        ),
        ({"provenance_entropy": {}}, "provenance_entropy: must be a number, not an object ({})"),
        ({"provenance_entropy": -1}, "provenance_entropy: -1 is not in [0, ∞) bits"),
        ({"provenance_entropy": float("nan")}, "provenance_entropy: NaN is not in [0, ∞) bits"),
        ({"provenance_entropy": float("inf")}, "provenance_entropy: Infinity is not in [0, ∞) bits"),
        ({"provenance_entropy": 10**400}, "provenance_entropy: a huge integer is not in [0, ∞) bits"),
        (
            {"prov_entropy": 3.6},
            "provenance_entropy: differs from its other name, prov_entropy (3.5 and 3.6)",
        ),
    ],
)
def test_invalid_provenance(write, source, problem):
    message = problem_of(write, {"text": "a", **SOURCE, **source})
    assert message.startswith(f"1: {problem}")
    assert "; " in message


def check(path, **options):
    columns = columns_of(TrainConfig(**options))
    source = open_source(str(path), columns)
    reader = RecordReader((source,), columns, 0.0, 0.0, options.get("default_weight"))
    stats = check_records(reader)
    assert stats.columns == check_records(replace(reader, authority_weight=0.5)).columns
    return [record.weight for record in reader.records()], stats


def test_weights_of_records(write):
    """All records have a weight, or none has, unless there is a default."""
    texts = [{"text": "a"}, {"text": "b", "weight": None}]
    weighted = [{"text": "c", "weight": 0}, {"text": "d", "weight": 2.5}]
    assert check(write(*texts))[0] == [1, 1]
    assert check(write(*weighted))[0] == [0, 2.5]
    assert check(write(*weighted, *texts), default_weight=0.5)[0] == [0, 2.5, 0.5, 0.5]
    assert check(write("text,weight", "a,0.5", "b,2", name="a.csv"))[0] == [0.5, 2]
    path = write(*({"text": "a", "w": number, "weight": "x"} for number in (1, 3)))
    assert check(path, weight_column="w")[0] == [1, 3]
    path = write(*weighted, *texts)
    with pytest.raises(DataError) as caught:
        check(path)
    headline, line = str(caught.value).splitlines()
    assert headline == f"{path}: 2 of 4 records are wrong"
    assert line == (
        f"{path}:3: weight: missing, but other records have one; add it, or give --default-weight "
        f"(2 records: also {path}:4)"
    )
    with pytest.raises(DataError, match="every record has weight 0; there is nothing to train on"):
        check(write(weighted[0]))
    for wrong in (-1, float("inf"), 1e300, 1e-16, "1", True, [1]):
        assert problem_of(write, {"text": "a", "weight": wrong, **SOURCE}).startswith("1: weight: ")


def test_an_error_of_all_records_is_one_line(write):
    """Then an option or the file is wrong: the line says which columns there are, and how to name them."""
    path = write(*({"question": f"{n}", "answer": "b", f"column{n}": 1} for n in range(30)))
    with pytest.raises(DataError) as caught:
        read_records(path, default_authority_weight=0, default_provenance_entropy=0)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}:1: no text, no prompt + completion, and no messages; give one of them")
    assert '(there is "question", "answer", "column0") (all 30 records)' in line
    assert line.endswith("; perhaps --prompt-column question --completion-column answer")
    assert len(caught.value.problems) == 30
    for row, hint in (
        ({"body": "a"}, "perhaps --text-column body"),
        ({"prompt": "a", "Response": "b"}, "perhaps --prompt-column prompt --completion-column Response"),
        ({"dialogue": []}, "perhaps --messages-column dialogue"),
        ({"mesages": []}, "perhaps --messages-column mesages"),
        ({"promt": "a", "completion": "b"}, "perhaps --prompt-column promt --completion-column completion"),
        ({"prompt": "a", "completoin": "b"}, "perhaps --prompt-column prompt --completion-column completoin"),
        (
            {"instruction": "a", "context": "", "response": "b", "category": "c"},
            "perhaps --prompt-column instruction context --completion-column response",
        ),
        ({"text": "a", "autority_weight": 0.5}, 'give --authority-weight-column "autority_weight"'),
    ):
        with pytest.raises(DataError) as caught:
            read_records(write(row), default_provenance_entropy=0)
        assert str(caught.value).splitlines()[-1].endswith(hint)


def test_a_file_of_another_kind_is_one_line(write):
    """Errors of JSON are equal if they differ only in their position."""
    path = write(*(" " * number + "no JSON" for number in range(30)))
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert str(caught.value) == (
        f"{path}:1: invalid JSON: expecting value; a record is one JSON object on one line (column 1) "
        "(all 30 records)"
    )


def test_columns_that_are_used_and_ignored(write):
    chat = {"messages": [USER, ASSISTANT], "system": "Be brief."}
    path = write(*({**chat, "text": None, "id": n, f"a{n}": 1, "weights": n} for n in range(300)))
    report = check(path)[1].columns
    assert report.used == ("messages", "system")
    assert report.ignored[:3] == ("id", "a0", "weights")
    assert len(report.ignored) < 300  # bounded
    assert report.similar == {
        "weights": '"weights" is ignored; if it is the weight, give --weight-column "weights"'
    }
    chosen = {"body": "a", "system": "b", "weight": 1, "instruction": "c", "output": "d"}
    report = check(write(chosen), text_column="body")[1].columns
    assert (report.used, report.ignored) == (("body", "weight"), ("system", "instruction", "output"))
    # A prompt without its completion is no content beside one that is complete.
    report = check(write({"prompt": "a", "prompt_id": "b", "messages": [USER, ASSISTANT]}))[1].columns
    assert (report.used, report.ignored) == (("messages",), ("prompt", "prompt_id"))
    # A label of a text is its class.
    report = check(write({"text": "a", "label": True}))[1].columns
    assert (report.used, report.ignored) == (("text",), ("label",))
    report = check(write({"messages": [USER, ASSISTANT], "label": 1}))[1].columns
    assert (report.used, report.ignored) == (("messages",), ("label",))
    preferences = {"text": "a", "chosen": "b", "rejected": "c"}
    report = check(write(preferences), text_column="chosen")[1].columns
    assert (report.used, report.ignored) == (("chosen",), ("text", "rejected"))
    report = check(write({"text": "a", "tool": []}))[1].columns
    assert list(report.similar.values()) == ['"tool" is ignored; if it is the tools, rename it to tools']


@pytest.mark.parametrize(
    ("name", "meant"),
    [("wieght", "weight"), ("weigth", "weight"), ("Toosl", "tools"), ("course", None), ("weather", None)],
)
def test_two_swapped_letters_are_a_probable_misspelling(write, name, meant):
    similar = check(write({"text": "a", name: 2}))[1].columns.similar
    assert list(similar) == ([name] if meant else [])
    assert all(f"if it is the {meant}," in advice for advice in similar.values())


def test_a_missing_prompt_is_reported_with_the_columns_there_are(write):
    both, swapped = {"prompt": "a", "completion": "b"}, {"promt": "a", "completion": "b"}
    with pytest.raises(DataError) as caught:
        check(write(both, swapped))
    headline, line = str(caught.value).splitlines()
    assert headline.endswith(": 1 of 2 records is wrong")
    assert line.endswith('give both, or only text (there is "promt", "completion")')


def test_a_default_does_not_hide_a_wrong_value(write):
    assert "outside" in problem_of(
        write, {"text": "a", **SOURCE, "authority_weight": 2}, default_authority_weight=0.5
    )


def test_all_errors_are_reported_at_once(write):
    valid = {"text": "a", **SOURCE}
    path = write(valid, {"prompt": "p"}, "", valid, b"{", {"text": "", **SOURCE})
    with pytest.raises(DataError) as caught:
        read_records(path)
    headline, *lines = str(caught.value).splitlines()
    assert headline == f"{path}: 3 of 5 records are wrong"
    assert lines == list(caught.value.problems)
    assert [line.removeprefix(f"{path}:")[:2] for line in lines] == ["2:", "2:", "2:", "5:", "6:"]


def test_the_first_twenty_errors_are_listed_and_the_remaining_counted(write):
    path = write(*({"text": "a", **SOURCE, "authority_weight": 2 + number} for number in range(33)))
    with pytest.raises(DataError) as caught:
        read_records(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[20].startswith(f"{path}:20: ")
    assert lines[21] == "and 13 more"
    assert len(caught.value.problems) == 33


def test_equal_errors_share_one_line(write):
    """Each different error has one line: its first location, the number of records, and further locations."""
    number, missing = {"text": 1, **SOURCE}, {"text": "a", "authority_weight": 0.1}
    path = write(*[missing] * 2, *[number] * 1500, {"text": "", **SOURCE})
    with pytest.raises(DataError) as caught:
        read_records(path)
    headline, *lines = str(caught.value).splitlines()
    assert headline == f"{path}: 1503 of 1503 records are wrong"
    assert len(lines) == 3
    assert lines[0].startswith(f"{path}:1: provenance_entropy: missing; ")
    assert lines[0].endswith(f" (2 records: also {path}:2)")
    assert lines[1].startswith(f"{path}:3: text: a number, not a string; ")
    assert lines[1].endswith(f" (1,500 records: also {path}:4, {path}:5, …)")
    assert lines[2] == f"{path}:1503: text: is empty; add text, or remove the record"
    assert len(caught.value.problems) == 1000


def test_equal_errors_do_not_hide_different_ones(write):
    """The first twenty different errors have a line each; the errors that have none are counted."""
    wrong = [{"text": "a", **SOURCE, "authority_weight": 2 + number} for number in range(33)]
    path = write(*wrong, *wrong[:20], *wrong[20:])
    with pytest.raises(DataError) as caught:
        read_records(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[20].startswith(f"{path}:20: authority_weight: 21 ")
    assert lines[20].endswith(f" (2 records: also {path}:53)")
    assert lines[21] == "and 26 more"


def one_line(path):
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)
    assert caught.value.problems == ()
    return str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    assert one_line(tmp_path / "none.jsonl") == f"{tmp_path}/none.jsonl: no such file or directory"
    assert "contains no data files" in one_line(tmp_path)
    (tmp_path / "file").touch()
    assert "cannot be read: Not a directory" in one_line(tmp_path / "file" / "data.jsonl")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that opens but cannot be read")
def test_an_error_while_reading():
    assert "cannot be read: Input/output error" in one_line("/proc/self/mem")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_records(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    assert "contains no records" in one_line(path)
