"""``distrust preview`` and ``distrust.preview``: what is shown is trained, and nothing else is read."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import distrust as package
from distrust import ConfigError, DataError, ModelError
from distrust.cli.preview import main
from distrust.config import flag, option_groups
from distrust.data import read_records, tokenize

pytest.importorskip("peft")

#: Each turn in a line, and the assistant's ends with EOS. Earlier reasoning is not repeated.
GROWING = """{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{
    eos_token if m.role == 'assistant' }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
REWRITING = """{{ bos_token }}{% for m in messages %}{{ m.role }}: {{
    '[' + m.reasoning_content + ']' if m.reasoning_content and loop.last }}{{ m.content }}{{
    eos_token if m.role == 'assistant' }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


def turns(*contents: str, **fields: object) -> dict[str, object]:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": messages, **fields}


@pytest.fixture
def write(tmp_path):
    """Writes records as a file; a string is a line as it is."""

    def write(*records, name="records.jsonl"):
        lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("templates")
    for name, text in (("growing", GROWING), ("rewriting", REWRITING)):
        (folder / f"{name}.jinja").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def show(distrust, tiny_model):
    """Runs the command with the tiny model."""

    def show(*arguments):
        return distrust("preview", *arguments, "--model", tiny_model)

    return show


def test_json_has_the_text_of_a_conversation_and_what_the_assistant_says(show, write, templates):
    path = write(turns("Hi 😀", "Hello, wörld", "more", "yes"))
    output = show(path, "--chat-template", templates / "growing.jinja", "--json")
    assert output.code == 0, output.err
    (entry,) = json.loads(output.out)
    text = "<bos>user: Hi 😀\nassistant: Hello, wörld<eos>\nuser: more\nassistant: yes<eos>\n"
    answers = [
        (text.index(answer), text.index(answer) + len(answer)) for answer in ("Hello, wörld<eos>", "yes<eos>")
    ]
    trained_bytes = len("Hello, wörld".encode()) + len("yes") + 2  # a token each, as <eos>
    assert entry == {
        "record": 1,
        "location": f"{path}:1",
        "sequence": 1,
        "sequences": 1,
        "text": text,
        "trained": [list(answer) for answer in answers],
        "tokens": len(text.encode()) - len("<bos><eos><eos>") + 3,
        "trained_tokens": trained_bytes,
        "weight": 1.0,
        "note": "",
    }


def test_texts_and_completions_have_their_special_tokens(show, write):
    output = show(write({"text": "salt"}, {"prompt": "é? ", "completion": "ore"}), "--json")
    text, completion = json.loads(output.out)
    assert (text["text"], text["trained"], text["tokens"]) == (
        "salt<eos>",
        [[1, 9]],
        5,
    )  # nothing predicts the s
    assert (completion["text"], completion["trained"]) == ("é? ore<eos>", [[3, 11]])
    assert (completion["tokens"], completion["trained_tokens"]) == (8, 4)


CONTENT = st.text(st.characters(codec="utf-8", exclude_characters="<>"), min_size=1).filter(str.strip)


@settings(max_examples=25, deadline=None)
@given(contents=st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3), limit=st.integers(2, 120))
def test_what_is_shown_is_what_is_trained(contents, limit, tiny_model, templates, tmp_path_factory):
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("random") / "records.jsonl"
    path.write_text(json.dumps(turns(*sum(contents, ()))) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = GROWING
    options = {"model": tiny_model, "chat_template": str(templates / "growing.jinja"), "max_length": limit}
    (shown,) = package.preview(path, **options).sequences
    try:
        corpus = tokenize(
            read_records(path, default_authority_weight=0, default_provenance_entropy=0),
            tokenizer,
            max_length=limit,
        )
    except DataError:
        assert shown.trained == ()
        assert "left out" in shown.note
        return
    assert shown.text == tokenizer.decode(corpus.input_ids)
    assert (shown.tokens, shown.trained_tokens) == (len(corpus.input_ids), corpus.loss_mask.sum())
    trained = "".join(shown.text[begin:end] for begin, end in shown.trained)
    expected = tokenizer.decode(corpus.input_ids[corpus.loss_mask])
    assert trained.rstrip("\ufffd") == expected.rstrip("\ufffd")  # a cut may fall within a character


def test_brackets_without_a_terminal_and_colours_on_one(show, write, templates, monkeypatch):
    arguments = write(turns("Hi", "Yes")), "--chat-template", templates / "growing.jinja"
    plain = show(*arguments)
    assert "<bos>user: Hi\nassistant: ⟦Yes<eos>⟧\n" in plain.out
    assert "record 1" in plain.out
    assert "26 tokens, 4 trained, weight 1" in plain.out
    assert "\033" not in plain.out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = show(*arguments).out
    assert "\033[32mYes\033[2m<eos>\033[22m\033[39m" in coloured  # trained, and a special token
    assert "\033[2m<bos>\033[22muser: Hi\n" in coloured
    assert "⟦" not in coloured
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert show(*arguments).out == plain.out


def test_a_template_that_rewrites_turns_gives_a_sequence_for_each(show, write, templates):
    record = turns("a", "one", "b", "two")
    for index in (1, 3):
        record["messages"][index]["reasoning_content"] = "why"
    arguments = write(record), "--chat-template", templates / "rewriting.jinja"
    first, second = json.loads(show(*arguments, "--json").out)
    assert first["text"] == "<bos>user: a\nassistant: [why]one<eos>\n"
    assert second["text"] == "<bos>user: a\nassistant: one<eos>\nuser: b\nassistant: [why]two<eos>\n"
    for part, answer in ((first, "[why]one<eos>"), (second, "[why]two<eos>")):
        assert [part["text"][slice(*span)] for span in part["trained"]] == [answer]
    out = show(*arguments).out
    assert 0 < out.index("sequence 1 of 2") < out.index("sequence 2 of 2")


def test_long_records_show_the_cut_or_why_they_are_left_out(show, write):
    path = write({"prompt": "abc", "completion": "defgh"}, {"prompt": "abcdefgh", "completion": "i"})
    output = show(path, "--max-length", 6)
    assert "abc⟦def⟧\n[cut: 3 tokens of it are beyond --max-length 6]" in output.out
    assert f"record 2 ({path}:2)\n[left out of training: too long for --max-length 6]" in output.out
    assert output.code == 0
    for options in (("--on-long", "error"), ("--strict",)):
        output = show(path, "--max-length", 6, *options)
        assert f"{path}:2: " in output.out
        assert output.code == 1
    output = show(path, "--max-length", 1000)
    assert "the model's context is 128 tokens" in output.err
    assert output.code == 2


def test_the_weight_is_the_product_of_record_messages_and_provenance(show, write, templates):
    provenance = {"authority_weight": 0.0, "provenance_entropy": 2.0}
    record = turns("a", "12", "b", "1234", weight=3, **provenance)
    record["messages"][3]["weight"] = 0.5
    output = show(write(record), "--chat-template", templates / "growing.jinja", "--json")
    messages = (3 * 1 + 5 * 0.5) / 8  # mean over the trained tokens, EOS included
    u = 1 + 0.6 * 2.7 * 2.0**2
    assert json.loads(output.out)[0]["weight"] == pytest.approx(3 * messages * u, rel=1e-6)
    off = show(write(record), "--chat-template", templates / "growing.jinja", "--json", "--weighting", "off")
    assert json.loads(off.out)[0]["weight"] == pytest.approx(3 * messages, rel=1e-6)
    left_out = show(write({"text": "salt", "weight": 0}, {"text": "ore", "weight": 1}))
    assert "[left out of training: its weight is 0]" in left_out.out
    assert left_out.code == 0


def test_errors_are_shown_with_their_records(show, write, templates):
    path = write(
        {"text": "salt", "authority_weight": 0.5, "provenance_entropy": 1},
        {"text": "ore"},
        "{broken",
        {"text": "ore", "authority_weight": 2, "provenance_entropy": 1},
        turns("only a question", authority_weight=0.5, provenance_entropy=1),
        {"text": "iron", "authority_weight": 0.5, "provenance_entropy": 1},
    )
    template = "--chat-template", templates / "growing.jinja"
    output = show(path, "-n", 6, *template)
    assert output.code == 1
    assert output.err == ""
    locations = re.findall(r"^(?:record \d+ \()?.*:(\d)", output.out.replace(f"{path}", ""), re.MULTILINE)
    assert locations == ["1", "2", "2", "3", "4", "5", "6"]  # two fields are missing in the second
    output = show(path, "-n", 6, *template, "--json")
    assert output.code == 1
    assert [entry["record"] for entry in json.loads(output.out)] == [1, 6]
    assert len(output.err.splitlines()) == 5
    weights = write({"text": "a b", "weight": 2}, {"text": "c d"})
    assert f"{weights}:2: weight: missing" in show(weights).out
    assert show(weights, "--default-weight", 1).code == 0


def test_names_weights_and_the_unused_template_are_shown_where_they_matter(
    show, write, templates, tiny_model
):
    path, template = (
        write({"prompt": "a", "completion": "b"}),
        ("--chat-template", templates / "growing.jinja"),
    )
    out = show(path).out
    assert out.startswith(f"model {tiny_model}, data {path}\n\nrecord 1")
    assert out.endswith(': trained\ncolumns: "prompt", "completion"\n')
    note = "prompts are trained as they are, without the model's chat template"
    assert note in show(path, *template).out
    for record in ({"text": "a"}, turns("Hi", "Yes")):
        assert note not in show(write(record), *template).out
    assert "weight: the record's times the turn's; training" in show(write({"text": "ab", "weight": 2})).out
    wrong = show(write({"text": 1})).out
    assert ": trained" not in wrong
    assert "weight:" not in wrong


def test_nothing_to_show_is_an_error_as_in_training(show, write):
    output = show(write())
    assert output.err.endswith("records.jsonl: contains no records; give at least one\n")
    assert output.code == 1
    output = show(write({"text": "a"}), "--chat-template", "chatlm")
    assert output.err == "distrust: --chat-template chatlm: no such file; did you mean chatml?\n"


def test_columns_are_named(show, write):
    output = show(write({"text": "a b", "id": 1, "autority_weight": 0.5}))
    assert 'columns: "text"; ignored: "id", "autority_weight"' in output.out
    assert '--authority-weight-column "autority_weight"' in output.out
    assert "perhaps --text-column body" in show(write({"body": "a b"})).out


def test_only_the_shown_records_are_read(show, write, distrust, tiny_model):
    path = write(*({"text": f"number {i}"} for i in range(1, 10)), "{broken")
    os.truncate(path, 1 << 40)  # a terabyte of zeros follows
    output = show(path)
    assert output.code == 0
    assert [f"number {i}" in output.out.replace("⟦", "") for i in range(1, 6)] == [True] * 3 + [False] * 2
    output = show(path, "--record", 9, "--json")
    assert [(entry["record"], entry["text"]) for entry in json.loads(output.out)] == [(9, "number 9<eos>")]
    assert show(path, "--record", 10).code == 1
    short = write({"text": "one"}, name="short.jsonl")
    assert "there is no record 2; the last one is 1" in show(short, "--record", 2).err
    assert "number 8" in show(path, "--record", 8, "-n", 2).out.replace("⟦", "")


@pytest.mark.parametrize(
    "arguments",
    [["-n", "0"], ["--record", "0"], ["--max-length", "1"], ["--on-long", "keep"], ["--html", "page.txt"]],
)
def test_wrong_options_are_refused(show, write, arguments):
    output = show(write({"text": "salt"}), *arguments)
    assert output.code == 2
    assert arguments[0].lstrip("-") in output.err.splitlines()[-1]


def test_data_and_model_must_exist(distrust, write, tmp_path):
    assert distrust("preview").code == 2
    assert "no such file" in distrust("preview", tmp_path / "none.jsonl").err
    (tmp_path / "tokenizer").mkdir()
    output = distrust("preview", write({"text": "salt"}), "--model", tmp_path / "tokenizer")
    assert "contains no config.json" in output.err
    assert output.code == 1


def test_it_takes_the_options_of_training(capsys, write, show, tmp_path):
    with pytest.raises(SystemExit):
        main(["--help"])
    help_text = capsys.readouterr().out
    groups = option_groups()
    names = {flag(option.name) for title in ("Model", "Data", "Weighting") for option in groups[title]}
    assert {name for name in names if not re.search(rf"^  {name}\b(?!-)", help_text, re.MULTILINE)} == {
        "--data",
        "--mix",
        "--cache-dir",
        "--max-ratio",
    }
    path = write({"q": "a", "r": "b", "a": "c"})
    options = "--prompt-column", "q", "r", "--completion-column", "a"
    assert "a\n\nb\n\n⟦c<eos>⟧" in show(path, *options).out
    config = tmp_path / "config.toml"
    config.write_text(f'data = "{path}"\ncompletion_column = "a"\nprompt_column = "q"\nbatch_size = 4\n')
    assert "a⟦c<eos>⟧" in show("--config", config).out
    assert "a\n\nb\n\n⟦c<eos>⟧" in show("--config", config, "--prompt-column", "q", "r").out


HOSTILE = "<script>alert(1)</script> & \u202e\033[31mred\x00</pre><img src=x onerror=alert(1)>"


def test_hostile_text_controls_neither_page_nor_terminal(show, write, templates, tmp_path):
    path = write(turns(HOSTILE, HOSTILE), {"text": ["<b>wrong"], "<b>": 1}, name="<i>records.jsonl")
    template = "--chat-template", templates / "growing.jinja"
    page = tmp_path / "page.html"
    assert show(path, *template, "--html", page).out == f"{page}\n"
    content = page.read_text("utf-8")
    tags = set(re.findall(r"<(/?\w+)", content.partition("<title>")[2]))
    allowed_tags = "title style div p br mark h2 pre i html"
    assert {tag.strip("/") for tag in tags} == set(allowed_tags.split())
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; " in content
    assert "default-src 'none'" in content
    for text in (content, show(path, *template).out):
        assert not {"\u202e", "\033", "\x00"} & set(text)
        assert "\\u202e\\u001b[31mred" in text


def test_a_page_is_written_whole_or_not_at_all(show, write, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("before")
    assert show(tmp_path / "none.jsonl", "--html", page).code == 1
    assert page.read_text() == "before"
    assert show(write({"text": "salt"}), "--html", page, "--json").code == 2
    assert show(write({"text": "salt"}), "--html", page).code == 0
    assert "<mark>alt<i>&lt;eos&gt;</i></mark>" in page.read_text()
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_no_weights_are_needed(tiny_model, write, tmp_path, run_python, forked_python):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    code = "import sys; from distrust.cli import main; print(main(sys.argv[1:]))"
    result = run_python(code, "preview", write({"text": "salt"}), "--model", model, python=forked_python)
    assert result.stdout.splitlines()[-1] == "0", result.stderr
    assert result.stderr == ""


def test_a_program_gets_an_object_that_a_notebook_displays(write, tiny_model):
    path = write({"text": "salt"}, "{", {"text": "ore"}, {"text": "iron"})
    shown = package.preview(path, model=tiny_model)
    assert [part.text for part in shown.sequences] == ["salt<eos>", "ore<eos>"]
    assert [error.startswith(f"{path}:2: invalid JSON") for error in shown.errors] == [True]
    assert "s⟦alt<eos>⟧" in str(shown)
    assert "s<mark>alt<i>&lt;eos&gt;</i></mark>" in shown._repr_html_()
    assert len(package.preview([path, path], model=tiny_model, n=2, record=4).sequences) == 2
    with pytest.raises(DataError, match="no record 5"):
        package.preview(path, model=tiny_model, record=5)
    with pytest.raises(ConfigError, match="record"):
        package.preview(path, model=tiny_model, record=0)
    with pytest.raises(ModelError):
        package.preview(path, model=path.parent / "none")
    with pytest.raises(TypeError, match="no_option"):
        package.preview(path, no_option=1)
