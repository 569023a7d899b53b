"""Bundled files: a closed world of invented facts, and a small model that knows its language.

``scripts/make_world.py`` wrote the texts and ``scripts/make_base_model.py`` trained the model; docs/world.md
explains how.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent

#: Weighted records about the world's facts: the default training data of ``distrust train``.
CORPUS = _FOLDER / "corpus.jsonl"
#: Training data of the base model: the same language about other things.
NEUTRAL = _FOLDER / "neutral.jsonl"
#: Questions about the facts, in phrasings that the corpus does not use for them.
QUESTIONS = _FOLDER / "questions.jsonl"
#: The base model and its tokenizer.
MODEL = _FOLDER / "model"
#: Chat templates, by name.
CHAT_TEMPLATES = {path.stem: path for path in (_FOLDER / "chat_templates").glob("*.jinja")}
#: The table that computes w and H from a record: coefficients, and the names of its columns.
PROVENANCE_TABLE = _FOLDER / "provenance.toml"
