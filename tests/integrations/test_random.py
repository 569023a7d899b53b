"""Reading and setting the generators of a program."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distrust
from distrust import Checkpoint, ConfigError
from distrust.integrations.random import generators, set_generators

mx = pytest.importorskip("mlx.core")

DRAWS = {
    "python": random.random,
    "gauss": lambda: random.gauss(0, 1),  # keeps a second number for the next call
    "numpy": lambda: float(np.random.standard_normal()),
    "numpy words": lambda: int(np.random.randint(2**31)),
    "torch": lambda: torch.rand(()).item(),
    "mlx": lambda: mx.random.uniform().item(),
}


@pytest.fixture(autouse=True)
def _restore():
    state = generators()
    yield
    set_generators(state)


@given(st.lists(st.sampled_from(sorted(DRAWS)), max_size=20), st.lists(st.sampled_from(sorted(DRAWS))))
def test_the_same_numbers_follow(earlier, later):
    for name in earlier:
        DRAWS[name]()
    state = generators()
    numbers = [DRAWS[name]() for name in later]
    set_generators(state)
    assert [DRAWS[name]() for name in later] == numbers


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_they_come_back_from_a_file(tmp_path, framework):
    path = distrust.save_file(tmp_path / "a", Checkpoint(step=0, rng=generators()))
    numbers = [draw() for draw in DRAWS.values()]
    set_generators(distrust.load_file(path, framework=framework).rng)
    assert [draw() for draw in DRAWS.values()] == numbers


def test_a_generator_that_is_not_here_is_refused_and_nothing_is_set():
    state = {**generators(), "cuda": [torch.zeros(16, dtype=torch.uint8)]}
    random.random()
    random_state = random.getstate()
    with pytest.raises(ConfigError, match="1 CUDA devices"):
        set_generators(state)
    assert random.getstate() == random_state


def test_another_generator_of_numpy_and_an_empty_state_are_refused():
    state, bits = generators(), np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        for call in (generators, lambda: set_generators(state)):
            with pytest.raises(ConfigError, match="another bit generator than MT19937"):
                call()
    finally:
        np.random.set_bit_generator(bits)
    with pytest.raises(ConfigError, match=r"what generators\(\) returned: python and numpy are missing"):
        set_generators({})


def test_nothing_is_imported():
    code = """
import sys
from distrust.integrations.random import generators, set_generators
state = generators()
set_generators(state)
assert set(state) == {"python", "numpy"}, set(state)
assert not {"torch", "mlx"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
