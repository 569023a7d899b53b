"""Computes authority weight w and provenance entropy H from what is known about a source.

Both are pure functions. Neither knows a source: the facts come with the data, and their coefficients come
from a table that the user can replace (``data/provenance/table.py``). Counts are on a logarithmic scale: the
tenth citation adds more than the thousandth. What can be changed after the fact (a web page, a wiki) proves
nothing about the past, so kinds that the table calls editable are not counted. A source that is named twice
counts once: otherwise repetition would look like diversity.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from distrust.errors import DataError
from distrust.weighting import MAX_AUTHORITY_WEIGHT


@dataclass(frozen=True, slots=True)
class Coefficients:
    """How much each ingredient adds to w; each finite, not negative and dimensionless."""

    rank: float  # for a rank of 1
    citations: float  # per power of ten of 1 + citation count
    consensus: float  # per power of ten of 1 + consensus count


@dataclass(frozen=True, slots=True)
class Evidence:
    """One item of a chain of evidence."""

    kind: str  # such as "notebook"; case and surrounding blanks are ignored
    share: float  # its part of the chain, finite and not negative; shares need not add up to 1
    id: str | None = None  # which notebook, if known


def authority_weight(
    *, rank: float, citation_count: float, consensus_count: float, coefficients: Coefficients
) -> float:
    """The logarithmic blend, clipped to [0, 0.99]. A high value means less training weight.

    w = c.rank · R + c.citations · log10(1 + citation_count) + c.consensus · log10(1 + consensus_count), with
    R for the rank and c for the coefficients.

    Args:
        rank: R, of the institution, in [0, 1]; 1 is the highest.
        citation_count: how often the source is cited, finite and not negative.
        consensus_count: how many other sources say the same, finite and not negative.
        coefficients: how much each of them adds.

    Returns:
        w in [0, 0.99], from primary record to coordinated consensus; it never falls as an argument grows.

    Raises:
        DataError: an argument is outside its range.
    """
    if not 0 <= rank <= 1:
        raise DataError(f"rank is outside [0, 1]: {rank}")
    blend = (
        coefficients.rank * rank
        + coefficients.citations * _magnitude(citation_count, "citation_count")
        + coefficients.consensus * _magnitude(consensus_count, "consensus_count")
    )
    return min(max(blend, 0.0), MAX_AUTHORITY_WEIGHT)


def _magnitude(count: float, name: str) -> float:
    if not 0 <= count < math.inf:  # false for NaN
        raise DataError(f"{name} is not a finite count, 0 or more: {count}")
    return math.log10(1 + count)


def provenance_entropy(chain: Iterable[Evidence], *, editable: Collection[str]) -> float:
    """Shannon entropy (Shannon, 1948) of the shares of distinct sources in a chain of evidence, in bits.

    H = −Σ p · log2 p, where p are the normalized shares. Items of an editable kind are left out. Items of the
    same kind and id are one source; items without an id are one source per kind.

    Args:
        chain: the items, in any order.
        editable: kinds that are not counted.

    Returns:
        H, between 0 and log2 of the number of distinct sources; 0 for fewer than two. Apart from rounding,
        neither the order of the items nor the scale of the shares changes it.

    Raises:
        DataError: a share is not a finite number, 0 or more.
    """
    excluded = {_normalize(kind) for kind in editable}
    shares: defaultdict[tuple[str, str | None], list[float]] = defaultdict(list)
    for item in chain:
        if not 0 <= item.share < math.inf:
            raise DataError(f"a share is not a finite number, 0 or more: {item.share}")
        kind = _normalize(item.kind)
        if kind not in excluded and item.share > 0:
            shares[kind, item.id or None].append(item.share)
    if len(shares) < 2:
        return 0.0
    largest = max(map(max, shares.values()))  # divided by it, no sum overflows
    sources = [math.fsum(share / largest for share in parts) for parts in shares.values()]
    total = math.fsum(sources)
    entropy = -math.fsum(p * math.log2(p) for p in (source / total for source in sources) if p)
    return max(0.0, entropy)  # -0.0 if one share is almost everything


def _normalize(kind: str) -> str:
    return kind.strip().casefold()
