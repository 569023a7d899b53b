"""A run has the same digest on any number of ranks."""

from __future__ import annotations

import pytest

from distrust.testing.models import write_records

TRAIN = """
import warnings
from distrust import DistrustTrainer, TrainConfig

def scenario(cases):
    digests = []
    for options in cases:
        with warnings.catch_warnings(action="ignore"):
            digests.append(DistrustTrainer(TrainConfig(**options), observers=[]).train().state_digest)
    return digests
"""
#: Whatever decides how a micro-batch is computed; combined, because each run takes time.
CASES = {
    "dropout, packing, mix, weighting, evaluation": {
        "lora_dropout": 0.2,
        "packing": True,
        "max_length": 40,
        "mix": [0.7, 0.3],
        "weighting": "published",
        "eval_every": 2,
    },
    "DoRA, bfloat16, checkpointing": {
        "dora": True,
        "dtype": "bfloat16",
        "gradient_checkpointing": True,
        "lora_dropout": 0.1,
    },
    "all weights": {"lora_rank": 0},
}


@pytest.fixture(scope="module")
def train(world, tiny_model, tiny_config, eval_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("digests")
    data = [str(write_records(folder / f"{name}.jsonl", 30, seed=seed)) for seed, name in enumerate("ab")]

    def train(count, names):
        cases = [
            {
                "data": data if "mix" in options else data[0],
                "eval_data": str(eval_data),
                "model": str(tiny_model),
                "gradient_accumulation": 3,
                "max_steps": 2,
                **options,
            }
            for options in map(CASES.get, names)
        ]
        runs = [
            {**vars(tiny_config(folder / f"{count}-{number}")), **options}
            for number, options in enumerate(cases)
        ]
        return dict(zip(names, world.values(TRAIN, count=count, cases=runs)[0], strict=True))

    return train


def test_the_digest_does_not_depend_on_the_number_of_ranks(train):
    alone = train(1, [*CASES])
    assert len(set(alone.values())) == len(CASES)
    first, second, third = CASES
    for count, names in ((2, [first, second]), (3, [first, third])):  # an uneven share; a micro-batch each
        assert train(count, names) == {name: alone[name] for name in names}
