"""Importing this does what each process that trains does once, a third of a short run: forks have it done.

Nothing here may leave a thread, since a fork would lose it.
"""

from __future__ import annotations

import os
import random
import tempfile
import warnings
from pathlib import Path
from unittest.mock import patch

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import distrust.cli.watchdog  # noqa: F401
from distrust.cli.train import parse
from distrust.testing.models import make_model

generator = random.getstate()
logging.disable_progress_bar()  # it has a thread
with (
    tempfile.TemporaryDirectory() as name,
    torch.random.fork_rng(devices=[]),
    patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"),
    warnings.catch_warnings(action="ignore"),
):
    folder = make_model(Path(name))
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=["q_proj"]))
    AutoTokenizer.from_pretrained(folder)
    parse(["--out", name])
logging.enable_progress_bar()
random.setstate(generator)
