"""``--from``: a new run that begins with trained weights, and is as exact as any other."""

from __future__ import annotations

import functools
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distrust import CheckpointManager, DistrustTrainer, TrainConfig
from distrust.engines import config_of_run, read_checkpoint
from distrust.errors import ConfigError, ResumeRefused
from distrust.export import export
from distrust.options import to_toml
from distrust.testing.models import make_model
from distrust.training.events import StepEnded

pytestmark = pytest.mark.usefixtures("no_fsync")
both_engines = pytest.mark.parametrize(
    "engine",
    ["torch", pytest.param("mlx", marks=pytest.mark.skipif(find_spec("mlx_lm") is None, reason="no mlx-lm"))],
)
#: Options that change no weight, so that the last checkpoint has those of the start.
STILL = {"learning_rate": 0.0, "max_steps": 1}


def weights_of(run):
    """name -> float32 array, in the form of the engine that trained."""
    return {name: np.asarray(array) for name, array in read_checkpoint(run)[1].model.items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert np.array_equal(array, other[name]), name


@pytest.fixture(scope="module")
def train_engine(train, tmp_path_factory):
    """A run of each engine, made once."""

    @functools.cache
    def train_engine(engine):
        out = tmp_path_factory.mktemp("trained") / engine
        train(out, engine=engine, max_steps=2, target_modules=("q_proj", "down_proj"), rslora=True)
        return out

    return train_engine


@pytest.fixture
def source(train_engine, engine):
    return train_engine(engine)


def begin(origin, out, **options):
    """A run with nothing but ``--from``, and what a test changes."""
    options = {"engine": "torch", "device": "cpu", "threads": 1, "max_steps": 3, "save_every": 2} | options
    return DistrustTrainer(TrainConfig(out=str(out), from_=str(origin), **options)).train()


@both_engines
def test_a_run_begins_with_the_weights_and_options_of_another(source, tmp_path, engine):
    begin(source, tmp_path / "new", engine=engine, **STILL)
    assert_equal(weights_of(source), weights_of(tmp_path / "new"))
    config, source_config = config_of_run(tmp_path / "new"), config_of_run(source)
    for name in ("model", "data", "lora_rank", "rslora", "lora_dropout", "max_length"):
        assert getattr(config, name) == getattr(source_config, name)
    assert sorted(config.target_modules) == sorted(source_config.target_modules)
    assert config.learning_rate == 0  # other options are the new run's own


@both_engines
def test_it_resumes_exactly_without_its_source(train, source, tmp_path, engine):
    source = shutil.copytree(source, tmp_path / "source")
    alone = begin(source, tmp_path / "alone", engine=engine)
    config = TrainConfig(**vars(config_of_run(tmp_path / "alone")) | {"out": str(tmp_path / "run")})

    def stop(event):
        if isinstance(event, StepEnded) and event.step == 1:
            trainer.stop()

    trainer = DistrustTrainer(config, observers=[stop])
    trainer.train()
    moved = source.rename(tmp_path / "moved")
    assert begin(moved, tmp_path / "alone", engine=engine).already_finished  # the same weights elsewhere
    shutil.rmtree(moved)
    ended = begin(source, tmp_path / "run", engine=engine)  # the same command
    assert ended.state_digest == alone.state_digest
    # The start is part of the state: a run without it is another one.
    header = CheckpointManager(tmp_path / "run" / "checkpoints").scan().files[-1].header
    assert len(header.config["fingerprints"]["from"]) == 64
    options = vars(config_of_run(tmp_path / "run"))
    for moved_to in (None, str(tmp_path / "other")):
        with pytest.raises(ResumeRefused, match=f"--from was {source}, is {moved_to}"):
            DistrustTrainer(TrainConfig(**options | {"from_": moved_to})).train()


@pytest.mark.parametrize("engine", ["torch"])
def test_the_options_file_of_a_stranger_decides_nothing_but_names(source, tmp_path):
    source = shutil.copytree(source, tmp_path / "source")
    source_config = config_of_run(source)
    hostile = {
        "target_modules": ["re:(.*)*x"], "cache_dir": str(tmp_path / "written"), "max_record_bytes": 1 << 30,
        "chat_template": "/etc/passwd", "date": "1999-01-01",
    }  # fmt: skip
    (source / "config.toml").write_text(
        to_toml({"model": source_config.model, "data": source_config.data, **hostile})
    )
    begin(source, tmp_path / "new", **STILL)
    new_config = config_of_run(tmp_path / "new")
    assert sorted(new_config.target_modules) == sorted(source_config.target_modules)
    assert not (tmp_path / "written").exists()
    for name in ("cache_dir", "max_record_bytes", "chat_template"):
        assert getattr(new_config, name) == getattr(source_config, name)
    assert new_config.date != "1999-01-01"
    (source / "config.toml").write_text("model = ")
    with pytest.raises(ConfigError, match=r"^--from .*config.toml: not valid TOML"):
        begin(source, tmp_path / "other")


@pytest.mark.parametrize("engine", ["torch"])
def test_precision_and_quantization_are_those_of_the_source(train, source, tmp_path):
    train(tmp_path / "source", max_steps=1, dtype="bfloat16")
    begin(tmp_path / "source", tmp_path / "new", **STILL)
    assert_equal(weights_of(tmp_path / "source"), weights_of(tmp_path / "new"))
    assert config_of_run(tmp_path / "new").dtype == "bfloat16"
    with pytest.raises(ResumeRefused, match="was trained with --dtype float32, not bfloat16"):
        begin(source, tmp_path / "other", dtype="bfloat16")


@both_engines
@pytest.mark.parametrize("form", ["adapter", "mlx"])
def test_a_run_begins_with_an_adapter(train, source, data, tiny_model, tmp_path, engine, form):
    if form == "mlx" and find_spec("mlx_lm") is None:
        pytest.skip("no mlx-lm")
    export(source, tmp_path / "adapter", format=form)
    with pytest.raises(ConfigError, match="does not record what it was trained on; give --data"):
        begin(tmp_path / "adapter", tmp_path / "new", model=str(tiny_model))
    begin(
        tmp_path / "adapter", tmp_path / "new", model=str(tiny_model), data=str(data), engine=engine, **STILL
    )
    new_config, source_config = config_of_run(tmp_path / "new"), config_of_run(source)
    assert new_config.lora_rank == source_config.lora_rank
    assert sorted(new_config.target_modules) == ["down_proj", "q_proj"] or form == "mlx"
    assert_equal(weights_of(source), weights_of(tmp_path / "new"))


@pytest.mark.parametrize("engine", ["torch"])
def test_a_strangers_adapter_names_no_pattern(source, data, tiny_model, tmp_path):
    if find_spec("mlx_lm") is None:
        pytest.skip("no mlx-lm")
    export(source, tmp_path / "adapter", format="mlx")
    weights = tmp_path / "adapter" / "adapters.safetensors"
    arrays = {f"re:(.*)*{name.replace('.layers.', '')}": a for name, a in load_file(weights).items()}
    save_file(arrays, weights)
    with pytest.raises(ConfigError, match="does not record which modules its --target-modules pattern"):
        begin(tmp_path / "adapter", tmp_path / "new", model=str(tiny_model), data=str(data))


@pytest.mark.parametrize("engine", ["torch"])
def test_contradictions_are_reported_at_once(source, tmp_path):
    with pytest.raises(ConfigError) as refused:
        begin(source, tmp_path / "new", lora_rank=2, lora_alpha=7.0)
    assert str(refused.value).splitlines() == [
        f"--lora-rank is 2, but --from {source} has 4",
        f"--lora-alpha is 7.0, but --from {source} has 32.0",
    ]
    model = make_model(tmp_path / "other", seed=1)
    with pytest.raises(
        ResumeRefused, match=r"--from .*torch: was not trained on the weights of --model .*other"
    ):
        begin(source, tmp_path / "new", model=str(model))
    assert not (tmp_path / "new" / "config.toml").exists()
