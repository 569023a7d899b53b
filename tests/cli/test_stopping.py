"""Chat templates by option, and the end of a turn: in training, generation and exports."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from distrust import DistrustTrainer, TrainConfig, engines
from distrust.bundled import CHAT_TEMPLATES
from distrust.checkpoint.catalog import read_header
from distrust.cli import main
from distrust.errors import ConfigError
from distrust.run_record import RunRecord
from distrust.testing.models import make_model, train_arguments

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

END = "<|im_end|>"
QUESTION, ANSWER = "Who?", "ok"
OPTIONS = ["--weighting", "off", "--lora-rank", 16, "--learning-rate", 0.01, "--schedule", "constant"]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{{ '<|im_end|>' if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_chat_model(folder: Path, *marks: str, template: str | None = None) -> Path:
    """A model whose EOS ends no turn, as base models have it; ``marks`` are special tokens."""
    make_model(folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.chat_template = template
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_conversations(path: Path) -> Path:
    pairs = (QUESTION, ANSWER), ("What is it?", "no")
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    path.write_text("".join(json.dumps({"messages": both}) + "\n" for both in turns), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of the model ``model``, without a template, ``data.jsonl``, and ``run``, whose template is gone."""
    folder = tmp_path_factory.mktemp("stopping")
    make_chat_model(folder / "model", "<|im_start|>", END)
    write_conversations(folder / "data.jsonl")
    (folder / "mine.jinja").write_text(TEMPLATE, encoding="utf-8")
    options = [*OPTIONS, "--max-steps", 40, "--save-every", 30, "--chat-template", folder / "mine.jinja"]
    assert main(train_arguments(folder, folder / "run", *options)) == 0
    (folder / "mine.jinja").unlink()
    return folder


def answer_of(model, tokenizer) -> str:
    """What plain transformers generates, and where it stops."""
    turns = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return tokenizer.decode(output[0, inputs.input_ids.shape[1] :])


def test_a_chat_stops_at_the_end_of_the_turn(distrust, folder):
    chat = ["generate", folder / "run", "--max-new-tokens", 20, "--json", "--chat", "--prompt", QUESTION]
    (row,) = json.loads(distrust(*chat).out)
    assert row["checkpoint"] == ANSWER
    plain = [*chat[:-3], "--prompt", f"[user]{QUESTION}[assistant]"]
    (row,) = json.loads(distrust(*plain).out)
    assert row["checkpoint"].startswith(ANSWER)
    assert len(row["checkpoint"]) > len(ANSWER)  # a text does not end where a turn does


@pytest.mark.parametrize("engine", ["torch", "mlx"])
@pytest.mark.parametrize("configured", [END, [END], ["huge", -1, True, None, [], 2**70, END]])
def test_generation_stops_at_the_ids_of_the_generation_config(folder, tmp_path, engine, configured):
    if engine == "mlx":
        pytest.importorskip("mlx_lm")
    elif isinstance(configured, list) and "huge" in configured:
        pytest.skip("transformers itself refuses to load it")
    model = make_chat_model(tmp_path / "model", "<|im_start|>", END)
    end = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(END)
    ids = [end if entry == END else entry for entry in configured] if isinstance(configured, list) else end
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}), encoding="utf-8")
    loaded = engines.engine_of(*engines.read_checkpoint(folder / "run", framework=engine), model=str(model))
    options = {"max_new_tokens": 20, "temperature": 0.0, "seed": 0}
    text = engines.generate(loaded, f"[user]{QUESTION}[assistant]", **options)
    assert text == ANSWER == engines.generate(loaded, QUESTION, chat=True, **options)


def test_an_adapter_stops_in_plain_transformers_as_its_card_loads_it(distrust, folder, tmp_path):
    output = distrust("export", folder / "run", "--to", tmp_path / "adapter", "--format", "adapter")
    assert output.code == 0
    warning = rf"warning: the generation config of \S+ does not stop at {re.escape(END)}; .* as its README"
    assert re.search(warning, output.err)
    config = json.loads((tmp_path / "adapter" / "generation_config.json").read_text())
    end = AutoTokenizer.from_pretrained(folder / "model").convert_tokens_to_ids(END)
    assert config == {"bos_token_id": 0, "eos_token_id": [1, end], "pad_token_id": 2, **config}
    assert (tmp_path / "adapter" / "chat_template.jinja").read_text() == TEMPLATE
    code = (tmp_path / "adapter" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('"FOLDER-OF-THE-BASE-MODEL"', repr(str(folder / "model")))
    namespace: dict = {}
    exec(code.replace('"FOLDER"', repr(str(tmp_path / "adapter"))), namespace)
    assert answer_of(namespace["model"], namespace["tokenizer"]) == ANSWER + END


def test_a_merged_model_stops_in_plain_transformers(distrust, folder, tmp_path):
    output = distrust("export", folder / "run", "--to", tmp_path / "merged", "--format", "merged")
    assert (output.code, "warning" in output.err) == (0, False)
    loaders = AutoModelForCausalLM, AutoTokenizer
    assert answer_of(*(loader.from_pretrained(tmp_path / "merged") for loader in loaders)) == ANSWER + END


def test_an_mlx_adapter_stops_in_mlx_lm_as_the_documentation_says(distrust, folder, tmp_path):
    mlx_lm = pytest.importorskip("mlx_lm")
    assert distrust("export", folder / "run", "--to", tmp_path / "mlx", "--format", "mlx").code == 0
    template = (tmp_path / "mlx" / "chat_template.jinja").read_text()
    assert template == TEMPLATE
    options = {"adapter_path": str(tmp_path / "mlx"), "tokenizer_config": {"chat_template": template}}
    model, tokenizer = mlx_lm.load(str(folder / "model"), **options)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True
    )
    tokenizer.add_eos_token(END)
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=20) == ANSWER


def test_a_base_model_that_stops_gives_no_warning(folder, tmp_path, distrust):
    """Entries of its generation config are kept; what no program could use is left out."""
    model = make_chat_model(tmp_path / "model", "<|im_start|>", END)
    end = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(END)
    written = {"eos_token_id": [end, 1, 70000, "x", [2]], "top_k": 7, "_from_model_config": True}
    (model / "generation_config.json").write_text(json.dumps(written), encoding="utf-8")
    output = distrust(
        "export", folder / "run", "--to", tmp_path / "a", "--format", "adapter", "--model", model
    )
    assert (output.code, "warning" in output.err) == (0, False)
    config = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert config == {"eos_token_id": [1, end], "top_k": 7}


def test_a_checkpoint_records_the_text_and_resumes_without_the_file(distrust, folder, tmp_path):
    def command(run, *options):
        return train_arguments(folder, run, *OPTIONS, "--max-steps", 4, *options)

    (tmp_path / "mine.jinja").write_text(TEMPLATE, encoding="utf-8")
    assert distrust(*command(tmp_path / "a", "--chat-template", tmp_path / "mine.jinja")).code == 0
    os.remove(tmp_path / "mine.jinja")
    # The text itself is a value, too; and the run is finished, by the same options.
    finished = distrust(*command(tmp_path / "a", "--chat-template", TEMPLATE))
    assert finished.code == 0
    assert "Nothing to do: the run finished at step 4" in finished.out
    assert distrust("eval", tmp_path / "a", "--data", folder / "data.jsonl").code == 0
    refused = distrust(*command(tmp_path / "a", "--max-steps", 6, "--chat-template", "chatml"))
    assert refused.code != 0
    assert "is read differently: --chat-template was" in refused.err
    assert len(refused.err) < 1000  # not the text of two templates


def test_a_checkpoint_names_no_file(folder, tmp_path):
    """A stranger's checkpoint has only the text of a template, or none."""
    header = read_header(next((folder / "run" / "checkpoints").glob("*final*"))).header
    record = RunRecord.from_header(header)
    assert record.train_config(where="x").chat_template == TEMPLATE
    for name in ("/etc/passwd", "chatml", str(tmp_path)):
        hostile = replace(record, settings={**record.settings, "chat_template": name})
        with pytest.raises(ConfigError, match=r"^x: chat_template is not the text of a template$"):
            hostile.train_config(where="x")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no such file"),
        (b"\xff{{ messages }}", "cannot be read: 'utf-8' codec"),
        (b"no template", "not a chat template"),
        (b"{{ messages }}" + b" " * (1 << 20), "more than 1,048,576 bytes"),
        (b"\n{% for m in messages %}", "not a valid chat template: line 2: "),
        (b"{{ messages | nothing }}", "not a valid chat template: line 1: No filter named"),
    ],
)
def test_a_file_that_is_no_template_is_refused(distrust, folder, tmp_path, content, reason):
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_bytes(content)
    output = distrust(*train_arguments(folder, tmp_path / "run", *OPTIONS, "--chat-template", path))
    assert (output.code, output.err.count("\n")) == (2, 1), output.err
    assert output.err.startswith(f"distrust: --chat-template {path}: {reason}")
    assert not (tmp_path / "run").exists()  # refused before anything is written


def test_the_bundled_template_is_chatml(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"].read_text(encoding="utf-8")
    turns = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant", "user")]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    assert rendered == f"{expected}<|im_start|>assistant\n"


def test_training_warns_where_generation_could_not_stop(folder, tmp_path):
    """The model's tokenizer has no token for the mark that ends a turn."""
    config = TrainConfig(
        model=str(make_model(tmp_path / "model")),
        data=str(folder / "data.jsonl"),
        out=str(tmp_path / "run"),
        chat_template="chatml",
        weighting="off",
        max_steps=1,
    )
    with pytest.warns(
        UserWarning, match=r"generation would not stop at the end of an answer, .*--chat-template"
    ):
        DistrustTrainer(config).train()
