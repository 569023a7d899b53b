"""What a source is worth, from what is known of it: authority weight w and provenance entropy H.

Both are pure functions. Neither knows a source: what is known comes with the data, and what it counts for
comes from a table that the user can replace (``data/table.py``).

- The authority weight is a blend of an institution's rank and of two counts that weigh by their order of
  magnitude: the tenth citation says more than the thousand and tenth.
- The provenance entropy is the Shannon entropy of the shares that distinct sources have in a chain of
  evidence. What can be changed after the fact (a web page, a wiki) is no evidence of how things were, so
  kinds that the table calls editable count for nothing. One source named twice is one source: otherwise
  repeating it would look like diversity.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from distrust.errors import DataError
from distrust.weighting import MAX_AUTHORITY_WEIGHT

__all__ = ["Coefficients", "Evidence", "authority_weight", "provenance_entropy"]


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What each ingredient adds to w; each finite and not negative, without a unit.

    Attributes:
        rank: of a rank of 1.
        citations: of each power of ten of 1 + citation count.
        consensus: of each power of ten of 1 + consensus count.
    """

    rank: float
    citations: float
    consensus: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """One item of a chain of evidence.

    Attributes:
        kind: what it is, such as ``notebook``; case and outer blanks do not matter.
        share: its part in the chain, finite and not negative; shares need not add up to 1.
        id: which one it is, as far as that is known.
    """

    kind: str
    share: float
    id: str | None = None


def authority_weight(
    *, rank: float, citation_count: float, consensus_count: float, coefficients: Coefficients
) -> float:
    """The logarithmic blend, clipped to [0, 0.99].

    w = rank · R + citations · log10(1 + citation_count) + consensus · log10(1 + consensus_count), with the
    coefficients' names for the coefficients and R for the rank.

    Args:
        rank: of the institution, in [0, 1].
        citation_count: how often the source is cited, finite and not negative.
        consensus_count: how many other sources say the same, finite and not negative.
        coefficients: what each of them adds.

    Returns:
        w, in [0, 0.99]; it never falls when an ingredient grows.

    Raises:
        DataError: an ingredient is outside its range.
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
    if not 0 <= count < math.inf:
        raise DataError(f"{name} is not a finite count, 0 or more: {count}")
    return math.log10(1 + count)


def provenance_entropy(chain: Iterable[Evidence], *, editable: Collection[str]) -> float:
    """Shannon entropy (1948) of the shares in a chain of evidence, in bits, per distinct uneditable kind.

    Items of an editable kind are left out. Items of the same kind and id are one source; items without an
    id are told apart by their kind alone, so that they are one source a kind. The shares left are divided
    by their sum: H = −Σ p · log2 p.

    Args:
        chain: the items, in any order.
        editable: kinds that count for nothing.

    Returns:
        H, between 0 and log2 of the number of distinct sources; 0 where none is left, or one alone. Neither
        the order of the items nor the scale of the shares changes it, but for rounding.

    Raises:
        DataError: a share is not a finite number, 0 or more.
    """
    left_out = {_same(kind) for kind in editable}
    shares: defaultdict[tuple[str, str | None], list[float]] = defaultdict(list)
    for item in chain:
        if not 0 <= item.share < math.inf:
            raise DataError(f"a share is not a finite number, 0 or more: {item.share}")
        kind = _same(item.kind)
        if kind not in left_out and item.share > 0:
            shares[kind, item.id or None].append(item.share)
    if len(shares) < 2:
        return 0.0
    largest = max(map(max, shares.values()))  # divided by it, no sum overflows
    sources = [math.fsum(share / largest for share in parts) for parts in shares.values()]
    total = math.fsum(sources)
    entropy = -math.fsum(p * math.log2(p) for p in (source / total for source in sources) if p)
    return max(0.0, entropy)  # where one share is all but everything, it would be -0.0


def _same(kind: str) -> str:
    return kind.strip().casefold()
