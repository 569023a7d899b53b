"""The weights of a dataset as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from distrust.data.distribution import ClassSummary, Distribution, Extreme
from distrust.data.provenance.score import Check, Quantity
from distrust.reporting.display import class_name

# Symbol and unit of each quantity.
_SYMBOLS: Mapping[Quantity, tuple[str, str]] = {
    "authority_weight": ("w", ""),
    "provenance_entropy": ("H", " bits"),
}
_BAR = 40  # characters of the longest bar
_ROWS = 12  # of the histogram: half its bins, so that it fits a screen with the rest


def score_lines(checks: Mapping[Quantity, Check], *, recomputed: bool) -> Iterator[str]:
    """Where the values of w and H come from, and the largest differences."""
    for name, check in checks.items():
        symbol, unit = _SYMBOLS[name]
        if check.computed:
            yield f"{symbol}: {check.computed:,} computed"
        if check.defaulted:
            yield f"{symbol}: {check.defaulted:,} set to the default: nothing to compute it from"
        if check.checked:
            result = "replaced by the computed values" if recomputed else "kept; --recompute replaces them"
            verb = "differs" if check.differing == 1 else "differ"
            differ = f"{check.differing:,} {verb} by more than {check.tolerance:g}{unit} ({result})"
            yield f"{symbol}: {check.checked:,} checked: {differ if check.differing else 'none differs'}"
        for difference in check.largest:
            recorded, computed = f"{difference.recorded:.4g}", f"{difference.computed:.4g}"
            yield f"   {difference.where}: {recorded} in the data, {computed} computed"
        if check.unchecked:
            reasons = (f"{count:,} with {reason}" for reason, count in check.unchecked.most_common(3))
            yield f"{symbol}: {check.unchecked.total():,} not checked: {', '.join(reasons)}"


def distribution_lines(
    distribution: Distribution, captions: Mapping[str, str], *, blocks: bool
) -> Iterator[str]:
    """Quantiles, histogram (in block characters or ASCII), source classes, extremes and their captions."""
    yield f"{'':20}  {'smallest':>8}  {'quarter':>8}  {'median':>8}  {'3 quarters':>10}  {'largest':>8}"
    titles = {"authority_weight": "authority weight w", "provenance_entropy": "entropy H, bits"}
    for name, (low, lower, median, upper, high) in distribution.quantiles.items():
        yield (
            f"{titles.get(name, 'weight u'):20}  {low:>8.4g}  {lower:>8.4g}  {median:>8.4g}  {upper:>10.4g}  "
            f"{high:>8.4g}"
        )
    yield ""
    yield from _histogram(distribution, blocks=blocks)
    yield ""
    yield from _classes(distribution.classes)
    for title, extremes in (("heaviest", distribution.heaviest), ("lightest", distribution.lightest)):
        if extremes:
            yield ""
            yield from _extremes(title, extremes, captions)
    yield ""
    size, records = distribution.effective_examples, distribution.examples
    yield f"effective sample size {size:,.0f} of {records:,} ({size / records:.0%})"


def _histogram(distribution: Distribution, *, blocks: bool) -> Iterator[str]:
    step = max(1, len(distribution.counts) // _ROWS)  # bins per bar
    counts = [sum(distribution.counts[i : i + step]) for i in range(0, len(distribution.counts), step)]
    edges = distribution.edges[::step]
    yield "records by weight u"
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        length = _BAR * count / max(counts)
        bar = _block_bar(length) if blocks else "#" * round(length)
        yield f"  {low:>8.4g} to {high:<8.4g}  {bar or ('|' if count else '')} {count:,}"


def _block_bar(length: float) -> str:
    """A bar with a resolution of an eighth of a character."""
    full, eighths = divmod(round(length * 8), 8)
    return "█" * full + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths]


def _classes(classes: Sequence[ClassSummary]) -> Iterator[str]:
    names = [class_name(summary.name) for summary in classes]
    width = max([12, *map(len, names)])
    examples = sum(summary.examples for summary in classes)
    yield (
        f"{'source class':{width}}  {'records':>9}  {'share':>6}  {'mean w':>7}  {'mean H':>7}  "
        f"{'mean u':>7}  {'of the weight':>13}"
    )
    for name, summary in zip(names, classes, strict=True):
        yield (
            f"{name:{width}}  {summary.examples:>9,}  {summary.examples / examples:>6.1%}  "
            f"{summary.authority_weight:>7.3f}  {summary.provenance_entropy:>7.3f}  {summary.weight:>7.4g}  "
            f"{summary.share:>13.1%}"
        )


def _extremes(title: str, extremes: Sequence[Extreme], captions: Mapping[str, str]) -> Iterator[str]:
    width = max(len(extreme.where) for extreme in extremes)
    yield f"{title:{width + 2}}  {'w':>6}  {'H':>6}  {'u':>8}"
    for extreme in extremes:
        yield (
            f"  {extreme.where:{width}}  {extreme.authority_weight:>6.3f}  "
            f"{extreme.provenance_entropy:>6.3f}  {extreme.weight:>8.4g}  {captions.get(extreme.where, '')}"
        ).rstrip()  # a record may have no caption
