"""Options: documented, typed, bounded, with stable names; files and checkpoints use the same keys."""

from __future__ import annotations

import inspect
import re
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrust import TrainConfig
from distrust.cli.launch import Launch
from distrust.cli.train import parse
from distrust.config import flag, key, option_docs, option_groups
from distrust.config_text import from_mapping, from_toml
from distrust.errors import ConfigError
from distrust.options import Group
from distrust.run_record import RunRecord
from distrust.training.resume import merge_saved_options

#: Users' commands and files contain these names: none is ever removed, and adding one is deliberate.
OPTIONS = [
    "model",
    "chat_template",
    "max_length",
    "data",
    "mix",
    "split",
    "subset",
    "revision",
    "text_column",
    "prompt_column",
    "completion_column",
    "messages_column",
    "authority_weight_column",
    "provenance_entropy_column",
    "source_column",
    "weight_column",
    "default_weight",
    "default_authority_weight",
    "default_provenance_entropy",
    "max_record_bytes",
    "on_long",
    "strict",
    "date",
    "cache_dir",
    "out",
    "from_step",
    "from",
    "branch",
    "host",
    "weighting",
    "alpha",
    "lambda",
    "max_ratio",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers",
    "rslora",
    "dora",
    "max_steps",
    "epochs",
    "batch_size",
    "packing",
    "gradient_accumulation",
    "learning_rate",
    "warmup_steps",
    "warmup_ratio",
    "schedule",
    "decay_ratio",
    "schedule_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "clipping",
    "seed",
    "eval_data",
    "eval_split",
    "eval_fraction",
    "eval_every",
    "eval_at_start",
    "metric",
    "metric_mode",
    "early_stopping_patience",
    "save_every",
    "save_budget",
    "save_bytes_per_day",
    "keep_last",
    "keep_best",
    "keep_every",
    "mirror",
    "mirror_keep_last",
    "mirror_keep_best",
    "mirror_keep_every",
    "mirror_timeout",
    "take_over",
    "step_snapshots",
    "on_preemption",
    "recheck_every",
    "on_mismatch",
    "report_to",
    "log_every",
    "engine",
    "dtype",
    "device",
    "threads",
    "compile",
    "quantization",
    "gradient_checkpointing",
    "reload_every",
    "reload_above",
    "max_memory",
    "max_device_memory",
    "reduction",
    "shard",
    "rank_timeout",
]

NAMES = {field.name for field in fields(TrainConfig)}

#: For each option two valid values, and one that is invalid.
MIRROR = ("mirror_keep_last", "mirror_keep_best", "mirror_keep_every", "mirror_timeout", "take_over")
VALUES = {
    "model": ("a", "b"),
    "chat_template": ("chatml", None, ""),
    "data": ("a", "b"),
    "out": ("a", "b"),
    "eval_data": ("a", None),
    "max_length": (2, None, 1),
    "default_authority_weight": (0.99, 0.0, 1.0),
    "default_provenance_entropy": (0.0, None, -0.1),
    "mix": ((1.0,), None, (-1.0,)),
    "split": ("train", "test[:10%]", ""),
    "subset": ("a", None, ""),
    "revision": ("a", None, ""),
    "text_column": ("a", None, ""),
    "prompt_column": ("a", ("a", "b"), ""),
    "completion_column": ("a", None, ""),
    "messages_column": ("a", None, ""),
    "authority_weight_column": ("a", None, ""),
    "provenance_entropy_column": ("a", None, ""),
    "source_column": ("a", None, ""),
    "weight_column": ("a", None, ""),
    "default_weight": (0.0, None, -1.0),
    "eval_split": ("a", None, ""),
    "eval_fraction": (0.0, 0.0, 1.0),
    "max_record_bytes": (1, 1 << 24, 0),
    "on_long": ("drop", "error", "cut"),
    "strict": (True, False),
    "date": ("2026-11-27", None, "2026-11-31"),
    "cache_dir": ("a", None, ""),
    "weighting": ("off", "auto", "on"),
    "alpha": (2.3, 3.0, 3.1),
    "lambda_": (0.0, 5.0, -0.1),
    "max_ratio": (1.0, None, 0.9),
    "lora_rank": (1, 64, -1),
    "lora_alpha": (1.0, 1e-3, 0.0),
    "lora_dropout": (0.0, 0.99, 1.0),
    "target_modules": (("q_proj",), ("a", "b"), ()),
    "exclude_modules": (("a", "b"), ()),
    "layers": ("8-15", "0,4,8-15", "15-8"),
    "rslora": (True, False),
    "dora": (True, False),
    "packing": (True, False),
    "compile": (True, False),
    "max_steps": (1, None, 0),
    "epochs": (1, 9, 0),
    "batch_size": (1, 64, 0),
    "gradient_accumulation": (1, 4, 0),
    "learning_rate": (0.0, 1.0, -1e-9),
    "warmup_steps": (0, 10**6, -1),
    "warmup_ratio": (0.1, None, 1.5),
    "schedule": ("linear", "constant", "step"),
    "schedule_steps": (1, None, 0),
    "decay_ratio": (0.1, 1, 1.5),
    "weight_decay": (0.0, 0.5, float("nan")),
    "adam_beta1": (0.0, 0.99, 1.0),
    "adam_beta2": (0.0, 0.9999, -0.1),
    "adam_epsilon": (1e-12, 1.0, 0.0),
    "max_grad_norm": (0.0, 5.0, float("inf")),
    "clipping": ("weighted", "plain", "none"),
    "seed": (0, 2**63 - 1, -1),
    "dtype": ("float32", "bfloat16", "float16"),
    "engine": ("mlx", "torch", "jax"),
    "device": ("cpu", "cuda:12", "cuda:01", "tpu"),
    "threads": (1, None, 0),
    "gradient_checkpointing": (True, False),
    "quantization": ("none", "8bit", "2bit"),
    "reload_every": (1, None, 0),
    "reload_above": (0.5, None, 0.0),
    "max_memory": (1e-3, None, -1.0),
    "max_device_memory": (1e-3, None, 0.0),
    "reduction": ("fast", "exact", "slow"),
    "shard": ("base", "none", "some"),
    "rank_timeout": (0.5, 900.0, 0.0),
    "save_every": (7, "auto", "5d"),
    "save_budget": (0.01, 1.0, 0.0),
    "save_bytes_per_day": (0.5, 1000.0, 0.0),
    "mirror": ("s3://bucket/run", "folder", ""),
    "mirror_keep_last": (1, None, 0),
    "mirror_keep_best": (0, None, -1),
    "mirror_keep_every": (1, None, 0),
    "mirror_timeout": (0.0, 600.0, -1.0),
    "take_over": (True, False),
    "step_snapshots": (True, False),
    "on_preemption": (("file:/a", "command:b c", "aws"), (), ("file:",)),
    "recheck_every": (1, None, 0),
    "on_mismatch": ("stop", "rewind", "warn"),
    "keep_last": (1, 7, 0),
    "keep_best": (0, 7, -1),
    "keep_every": (1, None, 0),
    "metric": ("loss", "eval_perplexity/a b", "eval_loss/"),
    "metric_mode": ("max", "min", "most"),
    "eval_every": (1, 7, 0),
    "eval_at_start": (True, False),
    "early_stopping_patience": (1, None, 0),
    "report_to": (("wandb",), (), ("wandb", "wandb")),
    "log_every": (1, 7, 0),
    "from_step": (0, None, -1),
    "branch": (None,),
    "from_": ("a", None, ""),
    "host": (True, False),
}


def test_the_options_are_these():
    assert [key(field.name) for field in fields(TrainConfig)] == OPTIONS
    assert set(VALUES) == NAMES


def test_the_documentation_of_the_class_explains_every_option():
    documentation = " ".join(inspect.getdoc(TrainConfig).split())
    assert all(f" {name}: {doc}" in documentation for name, doc in option_docs().items())


def test_every_option_is_in_one_group():
    names = [option.name for options in option_groups().values() for option in options]
    assert names == [field.name for field in fields(TrainConfig)]


def test_every_option_has_an_effect():
    assert {field.metadata["effect"] for field in fields(TrainConfig)} == {"result", "bits", "free"}
    effects = [set(TrainConfig().with_effect(effect)) for effect in ("result", "bits", "free")]
    unrecorded = [key(field.name) for field in fields(TrainConfig) if field.metadata["if_changed"]]
    assert sorted([name for names in effects for name in names] + unrecorded) == sorted(OPTIONS)


@dataclass(frozen=True, kw_only=True)
class LaterConfig(TrainConfig):
    """A config with an option that came later."""

    later: int = Group("Later").result(1, if_changed=True)


def test_an_option_that_came_later_is_recorded_only_if_it_is_used():
    assert LaterConfig().with_effect("result") == TrainConfig().with_effect("result")
    assert LaterConfig(later=2).with_effect("result") == TrainConfig().with_effect("result") | {"later": 2}


@pytest.mark.parametrize(("saved", "now"), [(1, 2), (2, 1), (2, 3)])
def test_an_option_that_came_later_is_compared_with_its_default(saved, now):
    record = RunRecord(config=LaterConfig(later=saved).with_effect("result"), settings={})
    assert merge_saved_options(LaterConfig(later=saved), record) == (LaterConfig(later=saved), [])
    merged, differences = merge_saved_options(LaterConfig(later=now), record)
    assert (merged.later, differences) == (saved, [f"--later was {saved}, is {now}"])


def test_help_has_the_groups_of_the_reference(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit):
        parse(["--help"])
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, out.splitlines())) <= 90
    # Title, text, title, text, ...
    groups = re.split(r"^[^\w-]*((?:\w+ )?options)\W*$", out, flags=re.MULTILINE)[1:]
    assert groups[::2] == ["options", *(f"{title} options" for title in option_groups())]
    for text, options in zip(groups[3::2], option_groups().values(), strict=True):
        flags = re.findall(r"^\W*(--[\w-]+)[ ,]", text, re.MULTILINE)
        of_launcher = fields(Launch) if options[0].name == "reduction" else ()
        assert flags == [flag(option.name) for option in (*of_launcher, *options)]


def test_help_shows_each_default_once(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    assert "default: None" not in shown
    assert "(default: bundled)" in shown
    assert "--engine mlx" in shown.partition("examples:")[2]


def test_help_documents_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"])
    assert exit_.value.code == 0
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    shown = re.sub(r"[\s│]+", "", out)
    docs = option_docs()
    assert set(docs) == NAMES
    for name, doc in docs.items():
        assert re.search(rf"{re.escape(flag(name))}\b", out), name
        assert re.sub(r"\s+", "", doc) in shown, name
    assert "--config" in out
    assert "--lambda_" not in out
    assert "distrust train --model ./my-model" in out


def test_common_flags():
    flags = """
        --model m --data d --out o --max-steps 5 --batch-size 6 --gradient-accumulation 7 --lora-rank 8
        --lora-alpha 9 --learning-rate 1e-3 --warmup-steps 11 --save-every 12 --keep-last 13 --keep-best 14
        --seed 15 --dtype bfloat16 --device cpu --weighting published --alpha 2.5 --lambda 0.4 --max-ratio 4
        --target-modules q_proj v_proj --gradient-checkpointing
    """
    config = parse(flags.split())
    assert config == TrainConfig(
        model="m",
        data="d",
        out="o",
        max_steps=5,
        batch_size=6,
        gradient_accumulation=7,
        lora_rank=8,
        lora_alpha=9.0,
        learning_rate=1e-3,
        warmup_steps=11,
        save_every=12,
        keep_last=13,
        keep_best=14,
        seed=15,
        dtype="bfloat16",
        device="cpu",
        weighting="published",
        alpha=2.5,
        lambda_=0.4,
        max_ratio=4.0,
        target_modules=("q_proj", "v_proj"),
        gradient_checkpointing=True,
    )
    assert parse([]) == TrainConfig()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_bounds(name):
    valid, invalid = VALUES[name][:2], VALUES[name][2:]
    mirror = {"mirror": "runs/mirror"} if name in MIRROR else {}
    for value in valid:
        assert getattr(TrainConfig(**mirror | {name: value}), name) == value
    for value in invalid:
        with pytest.raises(ConfigError) as error:
            TrainConfig(**{name: value})
        entries = value if isinstance(value, tuple) else (value,)
        shown = " ".join(map(repr, entries)) or "nothing"
        assert str(error.value).startswith(f"{flag(name)} is {shown}: give ")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in VALUES if isinstance(getattr(TrainConfig(), name), float)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(name, value):
    with pytest.raises(ConfigError, match=re.escape(f"{flag(name)} is {value!r}")):
        TrainConfig(**{name: value})


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        TrainConfig(**{name: values[2] for name, values in VALUES.items() if len(values) > 2})
    wrong = [line.split(" is ")[0] for line in str(error.value).splitlines()]
    assert wrong == [flag(field.name) for field in fields(TrainConfig) if len(VALUES[field.name]) > 2]


@pytest.mark.parametrize(
    ("name", "value"), [("rslora", True), ("dora", True), ("target_modules", ("q_proj",)), ("layers", "3")]
)
def test_adapter_options_require_an_adapter(name, value):
    with pytest.raises(ConfigError, match=f"{flag(name)} is .*: give a --lora-rank; 0 makes no adapter"):
        TrainConfig(lora_rank=0, **{name: value})


@pytest.mark.parametrize("name", MIRROR)
def test_options_of_a_mirror_require_one(name):
    value = VALUES[name][0]
    with pytest.raises(ConfigError, match=f"^{flag(name)} is {value}: it needs --mirror, or an --out that"):
        TrainConfig(**{name: value})
    assert getattr(TrainConfig(out="s3://bucket/run", **{name: value}), name) == value


def test_quantization_requires_an_adapter():
    assert TrainConfig(lora_rank=0).lora_rank == 0
    with pytest.raises(ConfigError, match="--quantization is '8bit': give --lora-rank 1 or more"):
        TrainConfig(lora_rank=0, quantization="8bit")


def test_data_accepts_several_sources(tmp_path):
    assert parse(["--data", "a"]).data == "a"
    assert parse(["--data", "a", "b", "--mix", "3", "1"]) == TrainConfig(data=("a", "b"), mix=(3.0, 1.0))
    assert TrainConfig(data=[Path("a")]).data == TrainConfig(data=("a",)).data == "a"
    file = tmp_path / "run.toml"
    file.write_text('data = ["a", "b"]\nmix = [3, 1]\n')
    assert from_toml(file) == TrainConfig(data=("a", "b"), mix=(3.0, 1.0))


@pytest.mark.parametrize("mix", [(1.0,), (0.0, 0.0), (1.0, -1.0), (1.0, float("nan"))])
def test_mix_requires_a_share_for_each_source(mix):
    with pytest.raises(ConfigError, match=r"--mix is .*: give a share"):
        TrainConfig(data=("a", "b"), mix=mix)


@pytest.mark.parametrize("data", [(), ("a", "")])
def test_empty_source_names_are_refused(data):
    with pytest.raises(ConfigError, match=r"--data is .*: give a name"):
        TrainConfig(data=data)


def test_eval_fraction_excludes_eval_data():
    assert TrainConfig(eval_fraction=0.25).eval_fraction == 0.25
    with pytest.raises(ConfigError, match=r"--eval-fraction is 0\.1: give it without"):
        TrainConfig(eval_fraction=0.1, eval_data="a")
    with pytest.raises(ConfigError, match=r"--eval-fraction is 0\.1: give it without"):
        TrainConfig(eval_fraction=0.1, eval_split="test")


def test_branch_requires_a_step_and_another_folder():
    with pytest.raises(ConfigError, match="--branch is 'b': it requires --from-step"):
        TrainConfig(branch="b")
    with pytest.raises(ConfigError, match=r"--branch is '\./a/': give another one than --out"):
        TrainConfig(out="a", branch="./a/", from_step=1)
    assert TrainConfig(out="a", branch="b", from_step=1).branch == "b"


NO_ADAPTER = {"rslora": False, "dora": False}
configs = st.fixed_dictionaries({name: st.sampled_from(values[:2]) for name, values in VALUES.items()}).map(
    lambda values: TrainConfig(**values | ({} if values["lora_rank"] else NO_ADAPTER) | shard_of(values))
)


def shard_of(values):
    """A division of the base only where nothing contradicts it."""
    is_plain = values["lora_rank"] and not values["dora"] and not values["compile"]
    return {} if is_plain and values["quantization"] == "none" else {"shard": "none"}


def keys_of(config):
    return {
        name: value
        for effect in ("result", "bits", "free")
        for name, value in config.with_effect(effect).items()
    }


@given(configs)
def test_mapping_round_trip(config):
    assert from_mapping(keys_of(config), where="here") == config


@settings(max_examples=8)  # each has all options, and builds the parser twice
@given(configs)
def test_toml_file_equals_flags(config):
    def toml(value):
        if isinstance(value, bool):
            return str(value).lower()
        return repr(list(value)) if isinstance(value, tuple) else repr(value)

    lines = [f"{name} = {toml(value)}" for name, value in keys_of(config).items() if value is not None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.toml")
        path.write_text("\n".join(lines), encoding="utf-8")
        assert from_toml(path) == config
        assert parse(["--config", str(path)]) == config
        assert parse(["--config", str(path), "--seed", "77"]) == replace(config, seed=77)


def test_flags_override_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('learning_rate = 1e-3\nbatch_size = 4\ntarget_modules = ["a"]\nlambda = 1\n')
    config = parse(["--learning-rate", "5e-4", f"--config={file}", "--lambda", "0.25"])
    assert (config.learning_rate, config.batch_size, config.lambda_) == (5e-4, 4, 0.25)
    assert config.target_modules == ("a",)
    # A flag that says the default wins too.
    assert parse(["--config", str(file), "--batch-size", "8"]).batch_size == 8


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("learning-rate", "learning_rate"),
        ("learningrate", "learning_rate"),
        ("lambda_", "lambda"),
        ("bach_size", "batch_size"),
        ("max-steps", "max_steps"),
    ],
)
def test_unknown_key_suggests_a_name(typed, meant):
    with pytest.raises(
        ConfigError, match=re.escape(f"f.toml: unknown option {typed!r}; did you mean {meant}?")
    ):
        from_mapping({typed: 1}, where="f.toml")


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("batch_size", 1.5, "a whole number"),
        ("batch_size", "4", "a whole number"),
        ("batch_size", True, "a whole number"),
        ("batch_size", None, "a whole number"),
        ("learning_rate", "1e-4", "a number"),
        ("learning_rate", True, "a number"),
        ("model", 3, "a string"),
        ("gradient_checkpointing", 1, "true or false"),
        ("target_modules", "q_proj", "a list of strings"),
        ("target_modules", [1], "a list of strings"),
        ("weighting", "on", "one of auto, monotone, published, off"),
        ("weighting", 1, "one of auto, monotone, published, off"),
        ("dtype", ["float32"], "one of auto, float32, bfloat16"),
        ("data", 1, "a name, or a list of names"),
        ("data", ["a", 1], "a name, or a list of names"),
        ("mix", "0.5", "a list of numbers"),
        ("mix", [0.5, "a"], "a list of numbers"),
    ],
)
def test_wrong_type_in_a_file(name, value, wanted):
    with pytest.raises(ConfigError) as error:
        from_mapping({name: value}, where="f.toml")
    assert str(error.value) == f"f.toml: {flag(name)} is {value!r}: give {wanted}"


def test_all_problems_in_a_file_are_reported_at_once(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('bach_size = 4\nseed = "x"\n[optimizer]\nlr = 1\n')
    with pytest.raises(ConfigError) as error:
        from_toml(file)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{file}: ") for line in lines)
    file.write_text("alpha = 9.0\nbatch_size = 0\n")
    with pytest.raises(ConfigError) as error:
        from_toml(file)
    assert str(error.value).splitlines() == [
        f"{file}: --alpha is 9.0: give 2.3 to 3.0",
        f"{file}: --batch-size is 0: give 1 or more",
    ]


@pytest.mark.parametrize("content", [b"a = ", b"\xff\xfe", b"a = 1\na = 2", None])
def test_unreadable_file(tmp_path, content):
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        from_toml(file)
    assert str(error.value).startswith(f"--config {file}: ")
    assert "\n" not in str(error.value)


def test_integers_become_floats():
    config = from_mapping({"lora_alpha": 16, "lambda": 1}, where="here")
    assert type(config.lora_alpha) is float
    assert type(config.lambda_) is float


def test_tables_are_not_unknown_options():
    with pytest.raises(ConfigError, match=r"f.toml: \[train\] is a table; options must be top-level keys"):
        from_mapping({"train": {"seed": 1}}, where="f.toml")


def test_lists_equal_tuples():
    config = TrainConfig(data=["a", "b"], mix=[1.0, 2.0], target_modules=["q_proj"])
    assert config == TrainConfig(data=("a", "b"), mix=(1.0, 2.0), target_modules=("q_proj",))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch_size": "8"}, "--batch-size is '8': give a whole number"),
        ({"max_steps": 2.5}, "--max-steps is 2.5: give a whole number"),
        ({"packing": "no"}, "--packing is 'no': give true or false"),
        ({"out": None}, "--out is None: give a string"),
        ({"data": ["a", 3]}, r"--data is \['a', 3\]: give a name, or a list of names"),
    ],
)
def test_wrong_type_in_python(given, words):
    with pytest.raises(ConfigError, match=words):
        TrainConfig(**given)


def test_integer_equals_float():
    assert TrainConfig(learning_rate=1) == TrainConfig(learning_rate=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 10**400}, "--learning-rate is .*give a number"),
        ({"split": ["train"]}, r"--split is \['train'\]: give a string"),
        ({"metric": ["eval_loss"]}, r"--metric is \['eval_loss'\]: give a string"),
    ],
)
def test_values_that_no_option_takes(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**options)
