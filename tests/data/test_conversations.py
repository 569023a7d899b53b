"""Conversations in the usual forms: a record parses to what it says, or to one error that names its field."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust.data import read_records
from distrust.data.records import Completion, Conversation, Message
from distrust.errors import DataError

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
CALL = {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}
AS_TEXT = {"name": "now", "arguments": '{"zone": "UTC"}'}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data.jsonl"


def content_of(path, record):
    path.write_text(json.dumps({"authority_weight": 0, "provenance_entropy": 0, **record}) + "\n")
    return read_records(path)[0].content


def problem_of(path, record):
    with pytest.raises(DataError) as caught:
        content_of(path, record)
    (problem,) = caught.value.problems
    return problem.removeprefix(f"{path}:1: ")


def turn_of(path, turn, *before):
    return content_of(path, {"messages": [USER, *before, turn]}).messages[-1]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (ASSISTANT, Message("assistant", "So.")),
        ({**ASSISTANT, "name": "bot", "audio": None}, Message("assistant", "So.", 1.0, {"name": "bot"})),
        ({"from": "gpt", "value": "So."}, Message("assistant", "So.")),
        # Reasoning has one name, whichever the data uses.
        ({**ASSISTANT, "thinking": "Hm."}, Message("assistant", "So.", 1.0, {"reasoning_content": "Hm."})),
        (
            {**ASSISTANT, "reasoning": "Hm.", "reasoning_content": "Hm."},
            Message("assistant", "So.", 1.0, {"reasoning_content": "Hm."}),
        ),
        (
            {"role": "assistant", "thinking": "Hm."},
            Message("assistant", "", 1.0, {"reasoning_content": "Hm."}),
        ),
        # Parts of text are joined.
        (
            {"role": "assistant", "content": [{"type": "text", "text": "S"}, "o", {"text": "."}]},
            Message("assistant", "So."),
        ),
        (
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                    {"type": "text", "text": "So.", "image": None},
                ],
            },
            Message("assistant", "So.", 1.0, {"reasoning_content": "Hm."}),
        ),
        # Weights
        ({**ASSISTANT, "weight": 0}, Message("assistant", "So.", 0.0)),
        ({**ASSISTANT, "weight": 2.5, "train": True}, Message("assistant", "So.", 2.5)),
        ({**ASSISTANT, "train": False}, Message("assistant", "So.", 0.0)),
        ({**ASSISTANT, "training": False, "weight": 0}, Message("assistant", "So.", 0.0)),
        ({**ASSISTANT, "loss": False}, Message("assistant", "So.", 0.0)),
        ({**ASSISTANT, "loss": 0.5}, Message("assistant", "So.", 0.5)),
        ({**ASSISTANT, "loss": True, "train": 1}, Message("assistant", "So.")),
        ({**ASSISTANT, "weight": None}, Message("assistant", "So.")),
        ({"role": "user", "content": "Hi", "weight": 0}, Message("user", "Hi", 0.0)),
        # Calls have one form: OpenAI's, with arguments as an object.
        *(
            ({"role": "assistant", **fields}, Message("assistant", "", 1.0, {"tool_calls": [CALL]}))
            for fields in (
                {"tool_calls": [CALL]},
                {"content": None, "tool_calls": [{"type": "function", "function": AS_TEXT}]},
                {"content": "", "tool_calls": [AS_TEXT]},
                {"tool_calls": json.dumps([CALL])},
                {"function_call": AS_TEXT},
            )
        ),
        (
            {"role": "assistant", "tool_calls": [{**CALL, "id": "1", "index": 0}]},
            Message("assistant", "", 1.0, {"tool_calls": [{**CALL, "id": "1", "index": 0}]}),
        ),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", **AS_TEXT}]},
            Message("assistant", "", 1.0, {"tool_calls": [{**CALL, "id": "1"}]}),
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": None}}]},
            Message(
                "assistant",
                "",
                1.0,
                {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": None}}}]},
            ),
        ),
        *(
            ({key: speaker, text: json.dumps(calls)}, Message("assistant", "", 1.0, {"tool_calls": [CALL]}))
            for key, text, speaker, calls in (
                ("from", "value", "function_call", AS_TEXT),
                ("role", "content", "tool_call", [AS_TEXT]),
            )
        ),
        *(
            ({key: speaker, text: "12:00", "name": "now"}, Message("tool", "12:00", 1.0, {"name": "now"}))
            for key, text, speaker in (
                ("role", "content", "tool"),
                ("role", "content", "tool_response"),
                ("from", "value", "observation"),
                ("from", "value", "function"),
            )
        ),
        ({"role": "developer", "content": "Be brief."}, Message("developer", "Be brief.")),
        ({"role": "user", "content": "", "tool_calls": [], "thinking": ""}, Message("user", "")),
    ],
)
def test_what_a_turn_says(path, turn, message):
    assert turn_of(path, turn, ASSISTANT) == message


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        ({"role": "assistant"}, "content: missing"),
        ({"role": "tool", "name": "now"}, "content: missing"),
        ({"role": "assistant", "content": {"a": 1}}, "content: an object, not a string"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            'content[0]: a part of type "image_url"',
        ),
        ({"role": "user", "content": [{"type": ["text"], "text": "a"}]}, "content[0]: a part of type"),
        ({"role": "user", "content": [7]}, "content[0]: a number, not a part of text"),
        ({**ASSISTANT, "images": ["a.png"]}, "images: is not supported"),
        ({**ASSISTANT, "train_detail": [{}]}, "train_detail: is not supported"),
        # False and 0 say something, whatever the turn.
        *(
            ({**turn, name: value}, f"{name}: is not supported; remove it (weight or train says")
            for turn, name, value in (
                (ASSISTANT, "mask", 0),
                (ASSISTANT, "masked", False),
                (ASSISTANT, "loss_weight", 0.5),
                (ASSISTANT, "loss_mask", 0),
                (ASSISTANT, "trainable", False),
                (ASSISTANT, "train_on_turn", True),
                (ASSISTANT, "output_with_loss", False),
                (ASSISTANT, "prefix", True),
                (USER, "masked", True),
            )
        ),
        (
            {**ASSISTANT, "reasoning_content": "a", "thinking": "b"},
            "reasoning_content: differs from thinking",
        ),
        ({**USER, "reasoning_content": "a"}, "reasoning_content: is for assistant turns"),
        ({**USER, "tool_calls": [CALL]}, "tool_calls: is for assistant turns"),
        ({**ASSISTANT, "name": "\ud800"}, "name: holds half of a surrogate pair"),
        ({**ASSISTANT, "weight": -1}, "weight: -1 is not 0, or a number from 1e-15 to 1e15"),
        ({**ASSISTANT, "weight": float("nan")}, "weight: NaN is not 0, or a number"),
        ({**ASSISTANT, "weight": 1e16}, "weight: 1e+16 is not 0, or a number from 1e-15 to 1e15"),
        ({**ASSISTANT, "loss": 1e-16}, "loss: 1e-16 is not 0, or a number from 1e-15 to 1e15"),
        ({**ASSISTANT, "weight": True}, "weight: must be a number, not a boolean"),
        ({**ASSISTANT, "loss": "no"}, "loss: must be a number, not a string"),
        ({**ASSISTANT, "weight": 1, "train": False}, "weight: differs from train"),
        ({**ASSISTANT, "weight": 1, "loss": 2}, "weight: differs from loss"),
        ({**USER, "train": True}, "train: only assistant turns are trained"),
        ({**ASSISTANT, "tool_calls": 5}, "tool_calls: a number, not an object"),
        ({**ASSISTANT, "tool_calls": ["now()"]}, "tool_calls[0]: a string, not an object"),
        ({**ASSISTANT, "tool_calls": "now()"}, "tool_calls: not valid JSON (Expecting value)"),
        ({**ASSISTANT, "tool_calls": [{}]}, "tool_calls[0].name: missing"),
        (
            {**ASSISTANT, "tool_calls": [{"function": {"name": "f"}}]},
            "tool_calls[0].function.arguments: missing",
        ),
        (
            {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": "{"}]},
            "tool_calls[0].arguments: not valid JSON",
        ),
        ({**ASSISTANT, "tool_calls": [{"name": "f", "arguments": "[]"}]}, "tool_calls[0].arguments: a list"),
        (
            {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": '{"a": 1, "a": 2}'}]},
            'tool_calls[0].arguments: "a": appears twice',
        ),
        ({**ASSISTANT, "tool_calls": [CALL], "function_call": AS_TEXT}, "tool_calls: present together with"),
        ({"from": "function_call", "value": "now()"}, "value: not valid JSON"),
    ],
)
def test_a_turn_that_cannot_be_honoured(path, turn, problem):
    message = problem_of(path, {"messages": [USER, ASSISTANT, turn]})
    assert message.startswith(f"messages[2].{problem}")
    assert "; " in message  # the remedy


def test_system_tools_and_options_of_a_record(path):
    options = {"enable_thinking": False}
    record = {"messages": [USER, ASSISTANT], "tools": [TOOL], "chat_template_kwargs": options}
    turns = (Message("user", "Why?"), Message("assistant", "So."))
    expected = Conversation(turns, 0, (TOOL,), options)
    assert content_of(path, record) == expected
    assert content_of(path, {**record, "tools": json.dumps([TOOL]), "system": ""}) == expected
    assert content_of(path, {**record, "tools": [TOOL["function"]]}) == expected  # without the envelope
    assert content_of(path, {**record, "tools": [{"type": "function", **TOOL["function"]}]}) == expected
    system, brief = Message("system", "Be brief."), {"system": "Be brief."}
    assert content_of(path, {"messages": [USER, ASSISTANT], **brief}).messages == (system, *turns)
    pair = content_of(path, {"prompt": [USER], "completion": [ASSISTANT], "tools": "[]", **brief})
    assert pair == Conversation((system, *turns), trained_turns=2)
    # Whether the assistant may begin is for the chat template to say.
    greeting = {"conversations": [{"from": "gpt", "value": "So."}]}
    assert content_of(path, greeting).messages == turns[1:]
    assert content_of(path, {**greeting, **brief}).messages == (system, turns[1])
    prompt = {"system_prompt": "Be brief."}
    for fields in (prompt, {**prompt, "system": " "}, {**prompt, **brief}):
        assert content_of(path, {**greeting, **fields}).messages == (system, turns[1])
    assert content_of(path, {**greeting, "system_prompt": ""}).messages == turns[1:]
    stated = [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]
    assert content_of(path, {"messages": stated, **brief}).messages == (system, *turns)
    empty = {"system": "", "tools": [], "chat_template_kwargs": None}
    assert content_of(path, {"prompt": "a", "completion": "b", **empty}) == Completion("a", "b")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"system": 7}, "system: a number, not a string"),
        ({"tools": {"name": "f"}}, "tools: an object, not a list"),
        ({"tools": "now()"}, "tools: not valid JSON"),
        ({"tools": [TOOL, "now"]}, "tools[1]: a string, not an object"),
        ({"tools": [{"name": "\ud800"}]}, "tools[0]: holds half of a surrogate pair"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs: a list, not an object"),
        *(
            ({"chat_template_kwargs": {name: None}}, f"chat_template_kwargs.{name}: is set by the trainer")
            for name in ("tools", "tokenize", "max_length", "documents", "bos_token", "image_token")
        ),
        ({"system_prompt": 7}, "system_prompt: a number, not a string"),
        ({"system": "a", "system_prompt": "b"}, "system_prompt: differs from the system turn"),
        # Preferences: an answer that is marked bad must not be trained like a good one.
        *(
            ({name: value}, f"{name}: cannot be honoured with messages; remove it, or name the columns to")
            for name, value in (
                ("chosen", ASSISTANT),
                ("rejected", "So."),
                ("kto_tag", False),
                ("label", False),
                ("mask_history", True),
            )
        ),
        ({"messages": None, "prompt": "a", "completion": "b", "label": True}, "label: cannot be honoured"),
        ({"messages": None, "text": "a", "chosen": "b"}, "chosen: cannot be honoured with text"),
        (
            {"system": "a", "messages": [{"role": "system", "content": "b"}, USER, ASSISTANT]},
            "system: differs",
        ),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "messages: no assistant turn is to be trained"),
        ({"messages": None, "text": "a", "tools": [TOOL]}, "tools: cannot be honoured with text"),
        (
            {"messages": None, "prompt": "a", "completion": "b", "system": "c"},
            "system: cannot be honoured with prompt + completion",
        ),
        (
            {"messages": None, "instruction": "a", "output": "b", "system": "c"},
            "system: cannot be honoured with instruction + output",
        ),
    ],
)
def test_a_record_that_cannot_be_honoured(path, fields, problem):
    message = problem_of(path, {"messages": [USER, ASSISTANT], **fields})
    assert message.startswith(problem)
    assert "; " in message


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_tables_fill_structs_with_nulls_which_say_nothing(tmp_path, kind):
    """JSON says null where it means it; a table says null for each member that only other rows have."""
    equivalent = {
        "role": "assistant",
        "tool_calls": [{"name": "at", "arguments": {"place": "Ulm"}}],
        "weight": 2.0,
    }
    tools = [TOOL, {"type": "function", "function": {"name": "at", "parameters": {"strict": True}}}]
    rows = [
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL["function"]]}], "tools": tools[:1]},
        {"messages": [USER, equivalent], "tools": tools},
    ]
    rows = [{**row, "authority_weight": 0.0, "provenance_entropy": 0.0} for row in rows]
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = tmp_path / "saved"
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(str(path))
    first, second = (record.content for record in read_records(path))
    assert first.messages == (Message("user", "Why?"), Message("assistant", "", 1.0, {"tool_calls": [CALL]}))
    assert first.tools == (TOOL,)
    assert second.messages[1].fields["tool_calls"][0]["function"] == equivalent["tool_calls"][0]
    assert second.messages[1].weight == 2
    assert list(second.tools) == tools


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
SCALAR = st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | TEXT
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
CALLS = st.fixed_dictionaries({"name": st.text("abc", min_size=1)}, optional={"arguments": VALUE, "id": TEXT})
PARTS = st.fixed_dictionaries({}, optional={"type": st.sampled_from(["text", "image"]), "text": TEXT})
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "function_call", "observation", "bot"])},
    optional={
        "content": SCALAR | st.lists(PARTS, max_size=2),
        "tool_calls": st.lists(CALLS, max_size=2) | VALUE,
        "reasoning_content": SCALAR,
        "thinking": SCALAR,
        "weight": SCALAR,
        "train": SCALAR,
        "loss": SCALAR,
        "tool_call_id": SCALAR,
        "extra": VALUE,
    },
)


CONTEXTS = st.fixed_dictionaries({}, optional={"system": SCALAR, "tools": VALUE})


@given(st.lists(TURNS, min_size=1, max_size=3), CONTEXTS)
def test_a_record_is_read_as_it_is_or_refused_with_its_field(tmp_path_factory, turns, context):
    path = tmp_path_factory.mktemp("rows") / "data.jsonl"
    try:
        content = content_of(path, {"messages": turns, **context})
    except DataError as error:
        (problem,) = error.problems
        field = problem.removeprefix(f"{path}:1: ").partition(":")[0].partition("[")[0].partition(".")[0]
        assert field in ("messages", *context)
        return
    messages = content.messages[-len(turns) :]
    if len(content.messages) > len(turns):
        assert content.messages[0] == Message("system", context["system"])
    for turn, message in zip(turns, messages, strict=True):
        stated = {name: value for name, value in turn.items() if value is not None}
        text = stated.get("content", "")
        if isinstance(text, list):
            text = "".join(part["text"] for part in text)
        if turn["role"] == "function_call":
            assert (message.role, message.content) == ("assistant", "")
            assert len(message.fields["tool_calls"]) >= 1
        else:
            assert message.content == text
        if message.role == "assistant":
            numbers = [stated[name] for name in ("weight", "train", "loss") if name in stated]
            assert {bool(number) for number in numbers} <= {message.weight > 0}
            thoughts = {stated[name] for name in ("reasoning_content", "thinking") if stated.get(name)}
            assert thoughts == {v for k, v in message.fields.items() if k == "reasoning_content"}
        for name in ("tool_call_id", "extra"):
            assert json.dumps(message.fields.get(name)) == json.dumps(stated.get(name))
        calls = stated.get("tool_calls") or []
        if isinstance(calls, list) and turn["role"] != "function_call":
            read = [call["function"]["name"] for call in message.fields.get("tool_calls", [])]
            assert read == [call["name"] for call in calls]
