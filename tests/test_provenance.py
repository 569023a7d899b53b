"""Computing w and H: properties, the table, and the fields of a record."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust.data.provenance import evidence
from distrust.data.provenance.evidence import MissingIngredientError
from distrust.data.provenance.table import load_table
from distrust.data.record_errors import RecordError
from distrust.errors import ConfigError, DataError
from distrust.provenance import Coefficients, Evidence, authority_weight, provenance_entropy
from distrust.weighting import MAX_AUTHORITY_WEIGHT

EDITABLE = ("web", "wiki")
KINDS = st.sampled_from(["notebook", "report", "letter", "web", "Wiki "])
items = st.builds(
    Evidence,
    kind=KINDS,
    share=st.floats(0, 1e6).filter(lambda share: share == 0 or share > 1e-6),
    id=st.none() | st.sampled_from("abc"),
)
chains = st.lists(items, max_size=12)
counts = st.floats(0, 1e15)
unit = st.floats(0, 1)
coefficients = st.builds(
    Coefficients, rank=st.floats(0, 2), citations=st.floats(0, 2), consensus=st.floats(0, 2)
)


def entropy(chain):
    return provenance_entropy(chain, editable=EDITABLE)


# H


@given(chain=chains)
def test_entropy_is_between_zero_and_that_of_equal_shares(chain):
    sources = {(item.kind, item.id) for item in chain if item.kind not in ("web", "Wiki ") and item.share > 0}
    assert 0 <= entropy(chain) <= math.log2(max(1, len(sources))) + 1e-9


@given(chain=chains, data=st.data())
def test_neither_order_nor_scale_matters(chain, data):
    assert entropy(data.draw(st.permutations(chain))) == entropy(chain)
    scaled = [Evidence(item.kind, item.share * 8, item.id) for item in chain]
    assert math.isclose(entropy(scaled), entropy(chain), abs_tol=1e-9)


@given(chain=st.lists(items, min_size=1, max_size=12), parts=st.integers(2, 5))
def test_one_source_named_several_times_is_one_source(chain, parts):
    first = chain[0]
    split = [Evidence(first.kind, first.share / parts, first.id)] * parts
    assert math.isclose(entropy([*split, *chain[1:]]), entropy(chain), abs_tol=1e-9)


@given(chain=chains, share=st.floats(0, 1e6))
def test_editable_kinds_are_not_counted(chain, share):
    assert entropy([*chain, Evidence("WIKI", share, "x")]) == entropy(chain)


def test_entropies_computed_by_hand():
    a, b = Evidence("report", 1, "a"), Evidence("report", 1, "b")
    assert entropy([]) == 0
    assert entropy([a]) == 0
    assert entropy([a, b]) == 1
    assert entropy([a, b, Evidence("letter", 1), Evidence("Letter ", 1)]) == pytest.approx(1.5)
    assert entropy([Evidence("report", 1), Evidence("report", 1)]) == 0, "without an id, one a kind"
    assert entropy([Evidence("web", 1, "a"), Evidence("web", 1, "b")]) == 0
    assert entropy([Evidence("letter", 1e308), Evidence("report", 1e308)]) == 1, "no sum overflows"
    assert entropy([Evidence("letter", 5e-324), Evidence("report", 1)]) < 1e-9


@pytest.mark.parametrize("share", [-1, math.nan, math.inf])
def test_invalid_shares_are_refused(share):
    with pytest.raises(DataError, match="share"):
        entropy([Evidence("report", share)])


# w


@given(rank=unit, citations=counts, consensus=counts, factor=st.floats(1, 10), weights=coefficients)
def test_w_never_falls_with_an_ingredient_and_stays_in_its_range(rank, citations, consensus, factor, weights):
    def w(rank, citations, consensus):
        return authority_weight(
            rank=rank, citation_count=citations, consensus_count=consensus, coefficients=weights
        )

    base = w(rank, citations, consensus)
    assert 0 <= base <= MAX_AUTHORITY_WEIGHT
    assert w(min(1, rank * factor), citations, consensus) >= base
    assert w(rank, citations * factor, consensus) >= base
    assert w(rank, citations, consensus * factor) >= base


def test_w_with_the_default_table():
    def w(**ingredients):
        return authority_weight(coefficients=load_table().coefficients, **ingredients)

    assert w(rank=0.3, citation_count=0, consensus_count=0) == 0.3
    assert w(rank=0.3, citation_count=9, consensus_count=0) == pytest.approx(0.5)
    assert w(rank=0.3, citation_count=0, consensus_count=99) == pytest.approx(0.5)
    assert w(rank=1, citation_count=10**300, consensus_count=0) == MAX_AUTHORITY_WEIGHT


@pytest.mark.parametrize(
    "wrong", [{"rank": 1.1}, {"rank": math.nan}, {"citation_count": -1}, {"consensus_count": math.inf}]
)
def test_ingredients_out_of_range_are_refused(wrong):
    ingredients = {"rank": 0.5, "citation_count": 1, "consensus_count": 1, **wrong}
    with pytest.raises(DataError, match=next(iter(wrong))):
        authority_weight(coefficients=Coefficients(1, 0.2, 0.1), **ingredients)


# The table


def table_of(tmp_path, text):
    path = tmp_path / "table.toml"
    path.write_text(text, encoding="utf-8")
    return load_table(path)


def test_a_table_replaces_only_the_keys_it_names(tmp_path):
    usual = load_table()
    assert usual.missing == {"rank": None, "citation_count": None, "consensus_count": 0}
    assert not usual.ranks, "the user decides who ranks how"
    custom = table_of(
        tmp_path, '[coefficients]\ncitations = 1\n[ranks]\n"A b" = 1\n[missing]\nrank = 0.25\n[columns]\n'
    )
    assert custom.coefficients == Coefficients(usual.coefficients.rank, 1.0, usual.coefficients.consensus)
    assert custom.ranks == {"A b": 1.0}
    assert custom.missing == {**usual.missing, "rank": 0.25}
    assert (custom.columns, custom.editable) == (usual.columns, usual.editable)
    assert table_of(tmp_path, '[evidence]\neditable = ["note"]').editable == ("note",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[coefficient]\nrank = 1", r"unknown table \[coefficient\]; did you mean coefficients\?"),
        ("[coefficients]\nranks = 1", r"unknown key 'ranks' in \[coefficients\]; did you mean rank\?"),
        ("[missing]\ncitation-counts = 1", "did you mean citation_count?"),
        ("ranks = 3", "ranks is not a table"),
        ("[coefficients]\nrank = -1", "give a number, 0 or more"),
        ("[coefficients]\nrank = true", "give a number, 0 or more"),
        ("[coefficients]\nrank = nan", "give a number, 0 or more"),
        ("[ranks]\nA = 1.5", "A in .ranks. is 1.5: give a number in .0, 1."),
        ("[missing]\nrank = 2", 'give a number in .0, 1., or "error"'),
        ("[columns]\nrank = ''", "give the name of a column"),
        ("[evidence]\neditable = 'web'", "give a list of kinds"),
        ("[ranks", "not valid TOML"),
        ("a = " + "[" * 10000, "not valid TOML"),
        ("[coefficients]\nrank = 1" + "0" * 400, "give a number, 0 or more"),
    ],
)
def test_errors_of_a_table(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        table_of(tmp_path, text)
    assert str(caught.value).count("table.toml") == len(str(caught.value).splitlines())


def test_all_errors_of_a_table_are_reported_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        table_of(tmp_path, "x = 1\n[ranks]\nA = 2\nB = 'b'\n[columns]\nranc = 'b'\n")
    assert len(str(caught.value).splitlines()) == 4


def test_a_missing_table(tmp_path):
    with pytest.raises(ConfigError, match="no such file or directory"):
        load_table(tmp_path / "none.toml")


# A record


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return table_of(tmp_path_factory.mktemp("table"), '[ranks]\nlab = 0.2\n"0.9" = 0.1\n')


def test_the_w_of_a_record(table):
    assert evidence.authority_weight({"institutional_rank": "lab", "citation_count": 9}, table) == 0.4
    assert evidence.authority_weight({"institutional_rank": 0.5, "citation_count": 0}, table) == 0.5
    as_text = {"institutional_rank": "0.5", "citation_count": "9", "consensus_count": ""}
    assert evidence.authority_weight(as_text, table) == 0.7, "as cells of a CSV file have them"
    by_name = {"institutional_rank": "0.9", "citation_count": 0}
    assert evidence.authority_weight(by_name, table) == 0.1, "a name that looks like a number is a name"
    counted = {"institutional_rank": 0, "citation_count": 0, "consensus_count": 9}
    assert evidence.authority_weight(counted, table) == 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"institutional_rank": True},
            "institutional_rank: must be a number, not a boolean (true); correct it",
        ),
        ({"institutional_rank": 1.01}, "institutional_rank: 1.01 is outside [0, 1]; 1 is the highest rank"),
        ({"citation_count": -1}, "citation_count: -1 is not a count, 0 or more; correct it"),
        ({"citation_count": "many"}, 'citation_count: must be a number, not a string ("many"); correct it'),
        ({"citation_count": float("nan")}, "citation_count: NaN is not a count, 0 or more; correct it"),
        ({"citation_count": 10**400}, "citation_count: a huge integer is not a count, 0 or more; correct it"),
        ({"consensus_count": []}, "consensus_count: must be a number, not a list ([]); correct it"),
    ],
)
def test_errors_of_ingredients_name_the_field(table, fields, message):
    with pytest.raises(RecordError) as caught:
        evidence.authority_weight({"institutional_rank": 0.1, "citation_count": 1, **fields}, table)
    assert str(caught.value) == message
    assert not isinstance(caught.value, MissingIngredientError)


def test_a_missing_ingredient_is_an_error_unless_the_table_replaces_it(table, tmp_path):
    with pytest.raises(MissingIngredientError, match="institutional_rank and citation_count: missing"):
        evidence.authority_weight({}, table)
    with pytest.raises(MissingIngredientError, match='institutional_rank: "x" has no rank'):
        evidence.authority_weight({"institutional_rank": "x", "citation_count": 1}, table)
    custom = table_of(tmp_path, "[missing]\nrank = 0.3\ncitation_count = 9")
    assert evidence.authority_weight({}, custom) == 0.5
    with pytest.raises(MissingIngredientError, match="evidence: missing"):
        evidence.provenance_entropy({}, table)


def test_the_h_of_a_record(table):
    chain = [{"kind": "report", "id": 1, "share": 1, "year": 1901}, {"kind": "report", "id": "2", "share": 1}]
    assert evidence.provenance_entropy({"evidence": chain}, table) == 1
    with_gaps = [
        {**item, "id": 1.0} for item in chain
    ]  # the same id, as a float from a table whose ids have gaps
    assert evidence.provenance_entropy({"evidence": with_gaps}, table) == 0
    assert evidence.provenance_entropy({"evidence": []}, table) == 0
    all_but_one = [{"kind": "a", "share": 1e308}, {"kind": "b", "share": 1e-308}]
    assert str(evidence.provenance_entropy({"evidence": all_but_one}, table)) == "0.0"
    assert evidence.provenance_entropy({"evidence": '[{"kind": "web", "share": 1}]'}, table) == 0


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ("no list", 'evidence: "no list" is not a list, nor JSON of one'),
        ("[" * 100_000, "is not a list, nor JSON of one"),
        ({"kind": "a"}, "evidence: an object, not a list"),
        (["report"], "evidence[0]: a string, not an object"),
        ([{"share": 1}], "evidence[0].kind: missing"),
        ([{"kind": " ", "share": 1}], 'evidence[0].kind: " " is not a kind'),
        ([{"kind": "a", "share": 1}, {"kind": "b"}], "evidence[1].share: missing"),
        ([{"kind": "a", "share": -0.5}], "evidence[0].share: -0.5 is not a finite share, 0 or more"),
        ([{"kind": "a", "share": math.inf}], "evidence[0].share: Infinity is not a finite share"),
        ([{"kind": "a", "share": False}], "evidence[0].share: must be a number, not a boolean (false)"),
        ([{"kind": "a", "share": 1, "id": []}], "evidence[0].id: a list ([]), not a name or a whole number"),
        (
            [{"kind": "a", "share": 1, "id": 1.5}],
            "evidence[0].id: a number (1.5), not a name or",
        ),
        ('[{"kind": "a", "share": 1, "share": 5}]', '"share": appears twice in one object'),
        ([{"kind": "a", "share": 0}], "evidence: all shares are 0"),
    ],
)
def test_errors_of_a_chain_name_the_field(table, chain, message):
    with pytest.raises(RecordError) as caught:
        evidence.provenance_entropy({"evidence": chain}, table)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200
