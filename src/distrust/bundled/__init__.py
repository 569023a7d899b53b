"""What comes with the package: a closed world of invented things, and a small model that knows its language.

``scripts/make_world.py`` wrote the texts and ``scripts/make_base_model.py`` trained the model; docs/world.md
says how.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent

#: Weighted records about the world's facts: what ``distrust train`` trains on by itself.
CORPUS = _HERE / "corpus.jsonl"
#: What the base model was trained on: the same language about other things.
NEUTRAL = _HERE / "neutral.jsonl"
#: Questions about the facts, in phrasings that the corpus does not use for them.
QUESTIONS = _HERE / "questions.jsonl"
#: The base model and its tokenizer.
MODEL = _HERE / "model"
#: How w and H follow from what a record says of its source: coefficients, and what its columns are called.
PROVENANCE_TABLE = _HERE / "provenance.toml"
