"""The tokenized examples: flat arrays that every later stage only reads.

The arrays may be files that are mapped into memory, larger than it: nothing here holds more than a block of
the tokens at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import overload

import numpy as np
from blake3 import blake3
from numpy.typing import ArrayLike, NDArray

from distrust.data.records import Location, Unit
from distrust.data.sampler import derived_seed, permutation
from distrust.errors import ConfigError

MAX_CLASSES = 100
"""So many source classes are told apart; what comes after them is of one more."""

OTHER_CLASSES = "(others)"

BLOCK = 1 << 22
"""How many items of an array are looked at together."""

Chunk = memoryview | bytes


@dataclass(frozen=True)
class Corpus:
    """Examples after tokenization and truncation; n of them.

    The arrays are made read-only, so that what was fingerprinted is what is trained on. Where an example
    stands is said by ``starts`` and ``lengths``, and by nothing else: a selection of examples shares the
    arrays of the tokens with the corpus that it was selected from.

    Attributes:
        input_ids: int32[total], the tokens of all examples, one example after the other.
        learned: bool[total], whether a token carries loss. Never the first of an example: nothing
            predicts it.
        offsets: int64[m + 1], where the m examples begin that there are tokens of, and the end.
        authority_weight: float64[n], w in [0, 0.99].
        provenance_entropy: float64[n], H in bits.
        locations: where each example comes from.
        truncated: how many of the m examples were cut to fit.
        tokens_cut: how many tokens they lost together.
        sizes: how many examples are of each source, in their order; empty for one source.
        selection: int64[n], which of the m examples these are; None for all of them.
        classes: the names of the source classes; shown only, so no part of the fingerprint.
        class_of: int32[n], which class each example is of; None where all are of the first.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    authority_weight: NDArray[np.float64]
    provenance_entropy: NDArray[np.float64]
    locations: Sequence[Location]
    truncated: int = 0
    tokens_cut: int = 0
    sizes: tuple[int, ...] = ()
    selection: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ("",)
    class_of: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        for array in self._arrays():
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.authority_weight)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """int64[n], where each example's tokens begin."""
        return self.offsets[:-1] if self.selection is None else self.offsets[self.selection]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """int64[n], the tokens of each example."""
        if self.selection is None:
            return np.diff(self.offsets)
        return self.offsets[self.selection + 1] - self.starts

    @cached_property
    def loss_tokens(self) -> NDArray[np.int64]:
        """int64[n], the learned tokens of each example: what its weight is weighed with."""
        counts = np.empty(len(self.offsets) - 1, np.int64)
        first = 0
        while first < len(counts):
            begin = self.offsets[first]
            # As many examples as fill a block, and one at least.
            last = max(first + 1, int(np.searchsorted(self.offsets, begin + BLOCK, "right")) - 1)
            ends = self.offsets[first : last + 1] - begin
            sums = np.concatenate(([0], np.cumsum(self.loss_mask[begin : begin + ends[-1]], dtype=np.int64)))
            counts[first:last] = np.diff(sums[ends])
            first = last
        return counts if self.selection is None else counts[self.selection]

    @property
    def class_numbers(self) -> NDArray[np.int32]:
        """int32[n], which class each example is of."""
        return np.zeros(len(self), np.int32) if self.class_of is None else self.class_of

    @cached_property
    def fingerprint(self) -> str:
        """BLAKE3, in hex, of all that training sees of the data; file names and lines are no part of it.

        That of ``digest_of`` the arrays; with the sizes of the sources, where there are several.
        """
        return with_sizes(
            digest_arrays(len(self), len(self.input_ids), (blocks(array) for array in self._arrays())),
            self.sizes,
        )

    def select(self, examples: ArrayLike) -> Corpus:
        """Some of the examples, in the order of their numbers; their tokens are shared, not copied.

        Args:
            examples: numbers of examples, int[k], none of them twice.
        """
        numbers = np.sort(np.asarray(examples, np.int64))
        ends = np.searchsorted(numbers, list(accumulate(self.sizes)))
        selected = replace(
            self,
            authority_weight=self.authority_weight[numbers],
            provenance_entropy=self.provenance_entropy[numbers],
            locations=SelectedLocations(self.locations, numbers),
            sizes=tuple(int(size) for size in np.diff(ends, prepend=0)),
            selection=numbers if self.selection is None else self.selection[numbers],
            class_of=None if self.class_of is None else self.class_of[numbers],
        )
        digest = blake3(f"distrust selection 1\n{self.fingerprint}\n".encode())
        digest.update(numbers.astype("<i8").tobytes())
        return selected.with_cached(fingerprint=digest.hexdigest(), loss_tokens=self.loss_tokens[numbers])

    def with_cached(self, *, fingerprint: str, loss_tokens: NDArray[np.int64]) -> Corpus:
        """This corpus, with what is known of it already and need not be computed."""
        vars(self).update(fingerprint=fingerprint, loss_tokens=loss_tokens)
        return self

    def _arrays(self) -> tuple[NDArray[np.generic], ...]:
        return (
            self.input_ids,
            self.loss_mask,
            self.offsets,
            self.authority_weight,
            self.provenance_entropy,
        )


class Classes:
    """The source classes of examples that are met one after the other, numbered as they are met."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The classes so far; one without a name where none was met."""
        return tuple(self._numbers) or ("",)

    def number(self, names: Iterable[str]) -> NDArray[np.int32]:
        """int32[k], the numbers of the classes of the next k examples."""
        return np.array([self._number(name) for name in names], np.int32)

    def _number(self, name: str) -> int:
        if name not in self._numbers and len(self._numbers) >= MAX_CLASSES:
            name = OTHER_CLASSES
        return self._numbers.setdefault(name, len(self._numbers))


def digest_arrays(n: int, total: int, arrays: Iterable[Iterable[Chunk]]) -> str:
    r"""The fingerprint of one source's corpus.

    Over ``distrust corpus 1\n``, then n and total, then the tokens, learned, offsets, w and H: each number
    little-endian, of the dtype it has in a corpus (learned a byte each, n and total 8 bytes each).
    """
    digest = blake3(b"distrust corpus 1\n", max_threads=blake3.AUTO)
    digest.update(np.array([n, total], "<i8").tobytes())
    for array in arrays:
        for chunk in array:
            digest.update(chunk)
    return str(digest.hexdigest())


def with_sizes(digest: str, sizes: tuple[int, ...]) -> str:
    """The fingerprint where there are several sources: where each begins decides what is drawn of it."""
    if len(sizes) < 2:
        return digest
    return str(blake3(f"distrust sources 1\n{digest}\n{sizes}".encode()).hexdigest())


def blocks(array: NDArray[np.generic]) -> Iterator[Chunk]:
    """An array's bytes, little-endian, a block at a time."""
    for begin in range(0, len(array), BLOCK):
        part = array[begin : begin + BLOCK]
        little = part.astype(part.dtype.newbyteorder("<"), copy=False)
        yield np.ascontiguousarray(little).view(np.uint8).data


class Locations(Sequence[Location]):
    """Where examples come from, as arrays: a location is made when it is asked for.

    Args:
        parts: the name of each part of the sources, and what it counts by.
        part: int32[n], the part of each example.
        line: int64[n], its line, row or index there.
    """

    def __init__(
        self, parts: Sequence[tuple[str, Unit]], part: NDArray[np.int32], line: NDArray[np.int64]
    ) -> None:
        self._parts = parts
        self._part = part
        self._line = line

    def __len__(self) -> int:
        return len(self._part)

    @overload
    def __getitem__(self, example: int) -> Location: ...
    @overload
    def __getitem__(self, example: slice) -> Sequence[Location]: ...
    def __getitem__(self, example: int | slice) -> Location | Sequence[Location]:
        if isinstance(example, slice):
            return Locations(self._parts, self._part[example], self._line[example])
        name, unit = self._parts[self._part[example]]
        return Location(name, int(self._line[example]), unit)


class SelectedLocations(Sequence[Location]):
    """Some of the locations.

    Args:
        locations: all of them.
        chosen: int64[n], which.
    """

    def __init__(self, locations: Sequence[Location], chosen: NDArray[np.int64]) -> None:
        self._locations = locations
        self._chosen = chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, example: int) -> Location: ...
    @overload
    def __getitem__(self, example: slice) -> Sequence[Location]: ...
    def __getitem__(self, example: int | slice) -> Location | Sequence[Location]:
        if isinstance(example, slice):
            return SelectedLocations(self._locations, self._chosen[example])
        return self._locations[int(self._chosen[example])]


#: Beyond the streams of the sources of a mix.
_STREAM = 1 << 32


def split_off(corpus: Corpus, fraction: float, *, seed: int) -> tuple[Corpus, Corpus]:
    """Keep out a share of each source.

    Args:
        corpus: all examples.
        fraction: the share, over 0 and under 1; rounded for each source, one example in all at least.
        seed: chooses which.

    Returns:
        What is trained on and what is evaluated on, without an example in common.

    Raises:
        ConfigError: there are too few examples.
    """
    sizes = corpus.sizes or (len(corpus),)
    kept_out = [min(int(fraction * size + 0.5), size - 1) for size in sizes]
    if not any(kept_out):
        kept_out[sizes.index(max(sizes))] = min(1, max(sizes) - 1)
    if not any(kept_out):
        raise ConfigError(f"--eval-fraction {fraction}: {len(corpus)} examples are too few to keep one out")
    evaluated = np.zeros(len(corpus), np.bool_)
    for source, (begin, size, count) in enumerate(
        zip([0, *accumulate(sizes)], sizes, kept_out, strict=False)
    ):
        drawn = permutation(size, seed=derived_seed(seed, _STREAM + source), epoch=0)
        evaluated[begin + drawn[:count]] = True
    return corpus.select(np.flatnonzero(~evaluated)), corpus.select(np.flatnonzero(evaluated))
