"""The folder of a base model is anyone's: it can waste little, leads nowhere else, and runs nothing."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
import torch
from safetensors.torch import load_file, save_file

from distrust import TrainConfig
from distrust.engines import create_engine, generate, model_folder
from distrust.engines.loading import load_tokenizer, locate
from distrust.engines.torch.export import prepare_adapter
from distrust.engines.torch.model import meta_model
from distrust.errors import ModelError
from distrust.testing.models import make_model

ENGINES = ["torch", "mlx"]
#: Backtracks for longer than anyone waits.
EXPONENTIAL = "(([a-z_0-9.])+)+!"


@pytest.fixture(scope="module")
def small_model_folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def base(small_model_folder, tmp_path):
    """A copy of a small model, to change."""
    return Path(shutil.copytree(small_model_folder, tmp_path / "base"))


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def load(base: Path, engine: str) -> Any:
    if engine == "mlx":
        pytest.importorskip("mlx_lm")
    return create_engine(TrainConfig(model=str(base), engine=engine, lora_rank=2, threads=1))


def assert_refused(base: Path, engine: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as refused:
        load(base, engine)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def add_adapter(base: Path) -> None:
    """An adapter that transformers would apply to the model, or would not finish matching."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": EXPONENTIAL}
    (base / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"])
def test_a_model_with_an_adapter_beside_it_is_refused(base, engine, file):
    (base / file).symlink_to("nowhere")
    assert_refused(base, engine, f"also holds an adapter .{file}.; merge it")


def test_an_adapter_beside_a_model_is_refused_wherever_a_model_is_read(base):
    add_adapter(base)
    config = TrainConfig(model=str(base), lora_rank=2)
    for read in (locate, load_tokenizer, meta_model):
        with pytest.raises(ModelError, match="also holds an adapter"):
            read(str(base))
    with pytest.raises(ModelError, match="also holds an adapter"):
        prepare_adapter(config, {}, dtype="float32")


def test_a_model_of_the_hub_is_checked_before_it_is_loaded(base, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / "hub" / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    snapshot = Path(shutil.copytree(base, cached / "snapshots" / ("0" * 40)))
    load(Path("owner/name"), "torch")
    change(snapshot / "config.json", decoder_layers=10**6)
    assert_refused(Path("owner/name"), "torch", "decoder_layers = 1000000 is larger than any model's")
    shutil.copy(base / "config.json", snapshot)
    shard(snapshot, "../other.safetensors")
    assert_refused(Path("owner/name"), "torch", "which is not a .safetensors file in the folder")
    add_adapter(snapshot)
    assert_refused(Path("owner/name"), "torch", "also holds an adapter")


#: Claims of config.json that no model makes, under names of every kind.
CLAIMS = [
    {"num_hidden_layers": 10**6},
    {"decoder_layers": 10**6},
    {"n_layer": 1 << 18},
    {"num_labels": 10**9},
    {"text_config": {"n_layers": [10**6]}},
    {"vision_config": {"encoder": {"num_experts": 10**8}}},
    {"hidden_size": 1 << 25},
    {"a width that nobody knows": -(1 << 25)},
    {"vocab_size": 1 << 40},
    {"max_position_embeddings": 1 << 40},
    {"num_hidden_layers": int("9" * 4000)},
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_absurd_sizes_are_refused_under_any_name(base, engine, claim):
    change(base / "config.json", **claim)
    assert_refused(base, engine, r"config\.json: .* is larger than any model's, \d+ at most; correct")


@pytest.mark.parametrize("engine", ENGINES)
def test_more_layers_than_the_files_can_hold_are_refused(base, engine, monkeypatch):
    monkeypatch.setattr(model_folder, "FREE_PARTS", 100)
    load(base, engine)
    change(base / "config.json", num_hidden_layers=50)
    assert_refused(base, engine, "more layers than its files can have weights for")


@pytest.mark.parametrize("engine", ENGINES)
def test_more_weights_than_the_files_hold_are_refused(base, engine):
    change(base / "config.json", intermediate_size=1 << 24)  # torch would fill 6 GB with random values
    assert_refused(
        base, engine, r"many times more weights than its files hold|Expected shape \(16777216, 32\)"
    )


REAL = {
    "a mixture of 512 experts": {"num_experts": 512, "num_hidden_layers": 94, "num_experts_per_tok": 10},
    "a context of ten million": {"text_config": {"max_position_embeddings": 10485760}, "rope_theta": 10**11},
    "a large vocabulary": {"vocab_size": 901629, "vocab_size_per_layer_input": 262144},
    "n-grams": {"ngram_vocab_size_base": 20_000_000, "encoder_hash_byte_group_vocab": 500_002},
    "405 billion": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126},
    "671 billion": {"n_routed_experts": 256, "kv_lora_rank": 512, "image_token_id": 262145},
    "no window": {"sliding_window": (1 << 31) - 1, "eos_token_id": [128001, 128008], "pad_token_id": -1},
    "many classes": {"num_labels": 21843, "id2label": {"0": "x"}},
    "notes": {"training_date": 20260101, "num_train_samples": 50_000_000, "total_flos": 10**12, "id": 10**9},
}  # fmt: skip


@pytest.mark.parametrize("kind", REAL)
def test_the_sizes_of_real_models_are_accepted(base, kind):
    change(base / "config.json", **REAL[kind])
    locate(str(base))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_other_threads_build_meanwhile_does_not_count(base, engine, monkeypatch):
    """A second thread builds modules of its own, and begins a load that ends after the first."""
    if engine == "mlx":
        pytest.importorskip("mlx_lm")
    limit_class = importlib.import_module(f"distrust.engines.{engine}.model")._BuildLimit
    layers = importlib.import_module("mlx.nn" if engine == "mlx" else "torch.nn")
    monkeypatch.setattr(model_folder, "FREE_PARTS", 10)
    initialize = layers.Module.__init__

    def build_much() -> None:
        for _ in range(1000):
            layers.Linear(1, 1)

    with ThreadPoolExecutor(1) as thread, limit_class(str(base), lambda: base):
        second = thread.submit(limit_class, "second", lambda: base).result()
        thread.submit(build_much).result()
        thread.submit(second.__enter__).result()
    build_much()
    second.__exit__()
    assert layers.Module.__init__ is initialize
    with pytest.raises(ModelError, match="more layers"), limit_class(str(base), lambda: base):
        build_much()


def test_the_shapes_of_a_model_need_no_weights(base):
    """Exporting an adapter reads a config alone: the weights may be elsewhere, or stubs of git-LFS."""
    change(base / "config.json", vocab_size=150_000, hidden_size=1024)
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert sum(weight.numel() for weight in meta_model(str(base)).parameters()) > 150_000 * 1024


def shard(base: Path, name: str) -> Path:
    """Move the weights of a model to another file, which an index names."""
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    path = base / name
    save_file(weights, path, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (base / model_folder.WEIGHTS_INDEX).write_text(json.dumps(index))
    return path


def test_a_divided_model_is_loaded(base):
    shard(base, "model-00001-of-00001.safetensors")
    load(base, "torch")


@pytest.mark.parametrize("where", ["../outside.safetensors", "sub/../../outside.safetensors", "absolute"])
def test_an_index_that_leads_out_of_the_folder_is_refused(base, where):
    (base / "sub").mkdir()
    shard(base, str(base.parent / "outside.safetensors") if where == "absolute" else where)
    assert_refused(
        base, "torch", r"index\.json names .*outside\.safetensors, which is not a \.safetensors file in"
    )


def test_weights_elsewhere_or_in_pickles_are_refused(base):
    weights = load_file(base / "model.safetensors")
    torch.save(weights, base / "pytorch_model.bin")
    for entry in ("../base/model.safetensors", "pytorch_model.bin"):
        change(base / "config.json", transformers_weights=entry)
        assert_refused(base, "torch", r"transformers_weights is not a \.safetensors file in the folder")
    change(base / "config.json", transformers_weights=None)
    (base / "model.safetensors").unlink()
    assert_refused(base, "torch", r"pickled .pytorch_model\.bin.*never read.*convert them to safetensors")


@pytest.mark.parametrize(
    "entries",
    [
        {"attn_implementation": "stranger/attention"},
        {"attn_implementation": {"text_config": "stranger/attention@main"}},
        {"text_config": {"_attn_implementation": "stranger/attention:f"}},
        {"experts_implementation": "stranger/experts"},
    ],
    ids=str,
)
def test_layers_from_the_hub_are_refused(base, entries):
    change(base / "config.json", **entries)
    assert_refused(base, "torch", "is code, which is never run")


def test_another_config_cannot_take_the_place_of_the_checked_one(base):
    shutil.copy(base / "config.json", base / "config.4.0.0.json")
    change(base / "config.json", configuration_files=["config.4.0.0.json"])
    assert_refused(base, "torch", "configuration_files")


CODE = "import pathlib; pathlib.Path({!r}).touch()\nclass Model: pass\nclass ModelArgs: pass\n"


@pytest.mark.parametrize("engine", ENGINES)
def test_no_code_of_a_folder_runs(base, engine, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(base)
    for name in ("code", "configuration_code", "modeling_code", "tokenization_code", "conversion"):
        (base / f"{name}.py").write_text(CODE.format(str(tmp_path / "ran")))
    (base / "custom_generate").mkdir()  # where transformers looks for another generate()
    shutil.copy(base / "code.py", base / "custom_generate" / "generate.py")
    auto_map = {
        "AutoConfig": "configuration_code.Config",
        "AutoModelForCausalLM": "modeling_code.Model",
        "AutoTokenizer": ["tokenization_code.Tokenizer", "tokenization_code.Tokenizer"],
    }
    change(base / "config.json", auto_map=auto_map)
    change(base / "tokenizer_config.json", auto_map=auto_map)
    change(base / "generation_config.json", custom_generate=".", auto_map=auto_map)
    engine_of_it = load(base, engine)
    generate(engine_of_it, "text", max_new_tokens=1, temperature=0, seed=0)
    for entries in ({"model_type": "code"}, {"model_type": "../../code"}, {"model_file": "code.py"}):
        changed = Path(shutil.copytree(base, tmp_path / str(len(list(tmp_path.iterdir())))))
        change(changed / "config.json", **entries)
        if engine == "mlx" or "model_file" not in entries:  # transformers does not know this entry
            assert_refused(changed, engine, "cannot be loaded")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_nobody_is_advised_to_run_the_code_of_a_model(base, engine):
    change(base / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"}, model_file="own.py")
    (base / "own.py").write_text("")
    with pytest.raises(ModelError, match="needs code of its own, which is never run") as refused:
        load(base, engine)
    assert "trust_remote_code" not in str(refused.value)


class Hub:
    """A hub that answers each request with one status, or that cannot be reached, and counts the requests."""

    def __init__(self, status: int | None, headers: dict[str, str]) -> None:
        self.requests = 0
        self._status, self._headers = status, headers

    def __call__(self, *, method: str, url: str, **_: Any) -> Any:
        from huggingface_hub.utils import _http

        self.requests += 1
        httpx = getattr(_http, "httpx2", None) or _http.httpx  # until huggingface_hub 2
        request = httpx.Request(method, url)
        if self._status is None:
            raise httpx.ConnectTimeout("timed out", request=request)
        return httpx.Response(self._status, headers=self._headers, request=request)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (None, "", r"the hub cannot be reached \(.*timed out\); is the name right\? A folder is \./no"),
        (404, "RepoNotFound", r"the hub has no such model; is the name right\? A folder is \./nobody/no"),
        (404, "EntryNotFound", r"it has no config\.json$"),
    ],
)
def test_why_the_hub_returned_no_model(tmp_path, monkeypatch, engine, status, code, reason):
    hub = Hub(status, {"X-Error-Code": code})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("distrust.data.hub.announce", lambda kind, name: None)
    monkeypatch.setattr("huggingface_hub.utils._http.get_session", lambda: SimpleNamespace(request=hub))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    assert_refused(Path("nobody/nothing"), engine, f"cannot be loaded: {reason}")
    assert hub.requests <= 8


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception.__globals__ }}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_reaches_nothing_outside_it(base, template, monkeypatch):
    monkeypatch.chdir(base)
    (base / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(str(base))
    assert tokenizer.chat_template == template
    turns = [{"role": "user", "content": "hello"}]
    with contextlib.suppress(jinja2.TemplateError, TypeError):  # refused, or undefined
        assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True).strip() == ""
    assert turns == [{"role": "user", "content": "hello"}]
    assert not (base / "ran").exists()


def test_a_tokenizer_reads_no_file_outside_its_folder(base, tmp_path):
    expected = load_tokenizer(str(base)).get_vocab()
    outside = tmp_path / "outside.json"
    raw = json.loads((base / "tokenizer.json").read_text())
    raw["model"]["vocab"]["a secret"] = len(expected)
    outside.write_text(json.dumps(raw))
    names = ("tokenizer_file", "vocab_file", "merges_file", "added_tokens_file", "special_tokens_map_file")
    change(base / "tokenizer_config.json", **dict.fromkeys(names, str(outside)), init_inputs=[str(outside)])
    assert load_tokenizer(str(base)).get_vocab() == expected
    (base / "tokenizer.4.0").mkdir()
    change(base / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0/../../outside.json"])
    with contextlib.suppress(ModelError):
        assert load_tokenizer(str(base)).get_vocab() == expected
