"""Determinism: the same micro-step again and again; and packed rows compared with padded ones."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.devices import count_kernels
from benchmarks.gpu.setting import Setting
from benchmarks.training.trainers import our_config
from benchmarks.training.weighting import plan_batches
from distrust.contract import Engine
from distrust.data import MicroBatch
from distrust.engines import create_engine

Figures = dict[str, Any]
RUNS = 6


def repeat(setting: Setting, options: Mapping[str, Any]) -> Figures:
    """The number of different gradients of one micro-step, and the kernels that computed them."""
    engine, batch = _engine_and_batch(setting, options)
    for step in (1, 2):  # LoRA's second matrix starts at zero, which hides the gradients of the first
        _pass(engine, batch, step)
        engine.clip_gradients(1.0)
        engine.update(learning_rate=0.01)
    digests = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(RUNS):
            _pass(engine, batch, 3)
            digests.add(_gradient_digest(engine))
    return {
        "digests": len(digests),
        "deterministic": engine.environment().get("deterministic", True),  # recorded on GPUs
        "attention": engine.environment()["attention"],
        **count_kernels(lambda: _pass(engine, batch, 3), setting.device),
        "warnings": sorted({str(w.message)[:90] for w in caught if "determin" in str(w.message)}),
    }


def compare_with_padded(setting: Setting, dtype: str) -> Figures:
    """How far losses and gradient norms of one row without padding are from those of padded examples.

    The padded engine has the model's own attention, by transformers: its config asks for ``eager``.
    """
    losses, norms, figures = [], [], {}
    for name, options in (("row", {}), ("padded", {"model": str(_eager_model(setting))})):
        engine, batch = _engine_and_batch(setting, {"dtype": dtype, **options})
        losses.append(_pass(engine, batch, 1))
        norms.append(engine.clip_gradients(0.0))
        figures[f"{name}_attention"] = engine.environment()["attention"]
    row, padded = (loss.cross_entropy for loss in losses)
    return {
        "losses_differ_by": float(abs(row / padded - 1).max()),
        "norm_differs_by": abs(norms[0] / norms[1] - 1),
        **figures,
    }


def _engine_and_batch(setting: Setting, options: Mapping[str, Any]) -> tuple[Engine, MicroBatch]:
    work = setting.work("40M")
    usual = {"batch_size": 4, "max_steps": 1, "cache_dir": str(work.folder / "cache")}
    config = our_config(work, **{**usual, **options})
    engine = create_engine(config)
    return engine, engine.prepare(plan_batches(config, engine).batches.step(1)[0])


def _pass(engine: Engine, batch: MicroBatch, step: int) -> Any:
    return engine.accumulate([batch], seed=1, step=step, tokens=batch.tokens)[0]


def _gradient_digest(engine: Any) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(engine.model.named_parameters()):
        if parameter.grad is not None:
            digest.update(name.encode() + parameter.grad.cpu().numpy().tobytes())
    return digest.hexdigest()


def _eager_model(setting: Setting) -> Path:
    work = setting.work("40M")
    folder = work.folder / "eager"
    shutil.copytree(work.folder / "model", folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "eager"}), "utf-8")
    return folder
