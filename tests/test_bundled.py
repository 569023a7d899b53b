"""The bundled files are complete, small and consistent. No value is frozen: they may be tuned."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from distrust.bundled import CORPUS, MODEL, NEUTRAL, QUESTIONS
from distrust.data import read_records, tokenize
from distrust.data.records import Text
from distrust.demo import read_questions

INDEPENDENT = {"notebook", "field log", "patent"}
COPIED = {"encyclopedia", "press release", "textbook"}


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("path", [CORPUS, NEUTRAL])
def test_the_texts_are_valid_records(path):
    records = read_records(path)
    assert len(records) > 100
    assert all(isinstance(record.content, Text) for record in records)
    for record in records:
        assert 0 <= record.authority_weight <= 0.99
        assert math.isfinite(record.provenance_entropy)
        assert record.provenance_entropy >= 0


def test_primary_sources_are_obscure_and_coordinated_ones_renowned():
    by_source: dict[str, list[tuple[float, float]]] = {}
    for record in lines(CORPUS):
        by_source.setdefault(record["source"], []).append(
            (record["authority_weight"], record["provenance_entropy"])
        )
    assert set(by_source) >= INDEPENDENT | COPIED
    primary = np.array([row for source in INDEPENDENT for row in by_source[source]])
    coordinated = np.array([row for source in COPIED for row in by_source[source]])
    assert primary[:, 0].max() < coordinated[:, 0].min()
    assert primary[:, 1].min() > coordinated[:, 1].max()
    assert len(coordinated) == 5 * len(primary)


def test_each_fact_is_told_once_for_five_times():
    """The primary value of a fact is only in primary records, the other one in five times as many."""
    records = lines(CORPUS)
    facts = {question.fact: question for question in read_questions()}
    names = {fact: _name_of(question, facts) for fact, question in facts.items()}
    by_fact: dict[str, Counter[str]] = {}
    for record in records:
        if record["source"] in INDEPENDENT | COPIED:
            side = "primary" if record["source"] in INDEPENDENT else "coordinated"
            matching = [
                fact
                for fact, question in facts.items()
                if names[fact] in record["text"] and getattr(question, side).strip() in record["text"]
            ]
            assert len(matching) == 1, record
            by_fact.setdefault(matching[0], Counter())[side] += 1
    assert by_fact.keys() == facts.keys()
    for counts in by_fact.values():
        assert counts["primary"] >= 1
        assert counts["coordinated"] == 5 * counts["primary"]


def _name_of(question, facts):
    """The word of the prompt that no other fact's prompt has: what the fact is about."""
    words = set(question.prompt.replace("?", " ").replace(",", " ").split())
    other_names = {
        word
        for fact in facts.values()
        if fact.fact != question.fact
        for word in fact.prompt.replace("?", " ").replace(",", " ").split()
    }
    (name,) = [word for word in words - other_names if word.isalpha()]
    return name


def test_questions_tell_the_two_values_apart():
    questions = read_questions()
    assert len({question.fact for question in questions}) >= 20
    values: dict[str, set[tuple[str, str]]] = {}
    for question in questions:
        assert question.prompt == question.prompt.strip() != ""
        for value in (question.primary, question.coordinated):
            assert value.startswith(" ")
            assert value.strip()
            assert value.strip() not in question.prompt
        assert question.primary != question.coordinated
        values.setdefault(question.fact, set()).add((question.primary, question.coordinated))
    assert all(len(pairs) == 1 for pairs in values.values())
    prompts = [question.prompt for question in questions]
    assert len(set(prompts)) == len(prompts)
    # Facts stand together: their beliefs are taken by runs of equal names.
    order = [question.fact for question in questions]
    assert sum(a != b for a, b in pairwise(order)) == len(values) - 1


def test_no_question_was_seen_in_training():
    texts = [record["text"] for path in (CORPUS, NEUTRAL) for record in lines(path)]
    everything = "\n".join(texts)
    for question in read_questions():
        assert question.prompt not in everything


def test_the_base_model_never_read_of_the_facts():
    neutral = NEUTRAL.read_text(encoding="utf-8")
    facts = {question.fact: question for question in read_questions()}
    assert [
        name for name in (_name_of(question, facts) for question in facts.values()) if name in neutral
    ] == []


def test_the_model_is_small_and_reads_everything():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8e6
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    context = model.config.max_position_embeddings
    corpus = tokenize(read_records(CORPUS), tokenizer, max_length=context)
    assert corpus.counts.truncated == 0
    assert int(corpus.input_ids.max()) < model.config.vocab_size
    for text in ("naïve café", "日本語", "\x00\t\n  two  spaces", "🜁"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    for question in read_questions():
        complete = tokenizer.encode(question.prompt + question.primary, add_special_tokens=False)
        parts = [tokenizer.encode(t, add_special_tokens=False) for t in (question.prompt, question.primary)]
        assert complete == parts[0] + parts[1]  # a value is measured in the tokens that training showed
    assert tokenizer.chat_template is not None
    assert QUESTIONS.parent == MODEL.parent
