"""The tokenized examples: flat arrays that every later stage only reads.

The arrays may be memory-mapped files larger than memory: no function here holds more than a block of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import ArrayLike, NDArray

from distrust.data.records import Location, Unit
from distrust.data.sampler import derived_seed, permutation
from distrust.errors import ConfigError, DataError

MAX_CLASSES = 100  # the largest number of named source classes; later ones are counted as ``OTHER_CLASSES``
OTHER_CLASSES = "(others)"
BLOCK = 1 << 22  # items of an array that are processed at once

_SPLIT_STREAM = 1 << 32  # random stream of the evaluation split, above those of the sources of a mixture

#: The arrays that training sees, in the order in which they are hashed. The second kind is None where it says
#: nothing: where each example is one sequence, and where all tokens weigh the same.
REQUIRED_ARRAYS = ("input_ids", "loss_mask", "offsets", "authority_weight", "provenance_entropy")
OPTIONAL_ARRAYS = ("sequence_offsets", "token_weights")

Chunk = memoryview | bytes

Parts = Sequence[tuple[str, Unit]]  # the name of each part of the sources, and how its rows are numbered


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """The number of items at the beginning that are equal."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


@dataclass(slots=True)
class Counts:
    """What became of the records, for display."""

    truncated: int = 0  # examples that were cut to the largest length
    tokens_cut: int = 0  # tokens they lost
    dropped: int = 0  # records left out, because they are too long, or nothing of them would be trained
    weightless: int = 0  # records left out, because their weight is 0
    altered: int = 0  # texts whose ids decode to another text
    first_altered: str = ""  # location of the first one, and how it differs

    def __add__(self, other: Counts) -> Counts:
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Counts(*(a + b if isinstance(a, int) else a or b for a, b in pairs))

    def compare(self, text: str, decoded: str, location: Location) -> None:
        """Count a text that the tokenizer does not reproduce."""
        if text != decoded:
            self.altered += 1
            begin = max(0, common_length(text, decoded) - 10)  # with a little of what is before
            text_part, decoded_part = text[begin : begin + 30], decoded[begin : begin + 30]
            self.first_altered = self.first_altered or f"{location}: {text_part!r} became {decoded_part!r}"

    def require_examples(self, examples: int, name: str) -> None:
        """Raise DataError if no record of a source with this name is left."""
        if not examples:
            reasons = {"too long for --max-length": self.dropped, "of weight 0": self.weightless}
            listed = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
            raise DataError(f"{name}: no record is left to train on ({listed})")


@dataclass(frozen=True)
class Corpus:
    """n examples after tokenization and truncation. An example is one sequence of tokens, or several.

    The arrays are read-only, so what was fingerprinted is what is trained on. ``starts`` and ``lengths`` are
    the only way to locate an example: a selection shares the token arrays of the m examples it is taken from.
    """

    input_ids: NDArray[np.int32]  # [total], the tokens of all m examples, concatenated
    loss_mask: NDArray[np.bool_]  # [total], whether a token is trained; never the first of an example
    offsets: NDArray[np.int64]  # [m + 1], where each of the m examples begins, and the end
    authority_weight: NDArray[np.float64]  # [n], w in [0, 0.99]; high means less training weight
    provenance_entropy: NDArray[np.float64]  # [n], H in bits
    locations: Sequence[Location]  # n of them
    counts: Counts = field(default_factory=Counts)  # of the records of the m examples
    sizes: tuple[int, ...] = ()  # examples of each source, in order; empty for one source
    selection: NDArray[np.int64] | None = None  # [n], indices into the m examples; None for all
    classes: tuple[str, ...] = ("",)  # source class names; for display, so not fingerprinted
    class_of: NDArray[np.int32] | None = None  # [n], indices into ``classes``; None if all are 0
    # [s + 1], where each of the s sequences begins, and the end; None if each example is one
    sequence_offsets: NDArray[np.int64] | None = None
    # [total], factor of the loss of each trained token, by its record and message; None if all are 1
    token_weights: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        for array in self._arrays().values():
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
        """int64[n], the trained tokens of each example."""
        return self._sums(lambda part: self.loss_mask[part], np.int64)

    @cached_property
    def loss_weights(self) -> NDArray[np.float64]:
        """float64[n], the sum of the token weights over the trained tokens of each example."""
        weights = self.token_weights
        if weights is None:
            return self.loss_tokens.astype(np.float64)
        return self._sums(lambda part: weights[part] * self.loss_mask[part], np.float64)

    def _sums(self, values: Callable[[slice], NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
        """The sum of a value per token over each example: [n], of ``dtype``."""
        sums = np.empty(len(self.offsets) - 1, dtype)
        first = 0
        while first < len(sums):
            start = self.offsets[first]
            # As many examples as fill a block, at least one.
            last = max(first + 1, int(np.searchsorted(self.offsets, start + BLOCK, "right")) - 1)
            ends = self.offsets[first : last + 1] - start  # relative to the block
            # Each sum on its own: a difference of running totals would lose what is small beside others.
            sums[first:last] = np.add.reduceat(values(slice(start, start + ends[-1])), ends[:-1], dtype=dtype)
            first = last
        return sums if self.selection is None else sums[self.selection]

    @property
    def bounds(self) -> NDArray[np.int64]:
        """int64[s + 1], where each sequence of all m examples begins, and the end."""
        return self.offsets if self.sequence_offsets is None else self.sequence_offsets

    @property
    def sequences(self) -> int:
        """The number of sequences of the n examples."""
        if self.sequence_offsets is None:
            return len(self)
        edges = self.starts, self.starts + self.lengths
        first, last = (np.searchsorted(self.sequence_offsets, edge) for edge in edges)
        return int((last - first).sum())

    @property
    def class_numbers(self) -> NDArray[np.int32]:
        """int32[n], the source class of each example, an index into ``classes``."""
        return np.zeros(len(self), np.int32) if self.class_of is None else self.class_of

    @cached_property
    def fingerprint(self) -> str:
        """BLAKE3, in hex, of all that training sees of the data; file names and lines are not part of it.

        The digest of the arrays (``digest_arrays``), combined with the sizes of several sources.
        """
        return add_sizes(
            digest_arrays(
                len(self),
                len(self.input_ids),
                {name: blocks(array) for name, array in self._arrays().items()},
            ),
            self.sizes,
        )

    def select(self, examples: ArrayLike) -> Corpus:
        """The examples with the distinct numbers int[k], in order; their tokens are shared, not copied."""
        numbers = np.sort(np.asarray(examples, np.int64))
        ends = np.searchsorted(numbers, list(accumulate(self.sizes)))
        selected = replace(
            self,
            authority_weight=self.authority_weight[numbers],
            provenance_entropy=self.provenance_entropy[numbers],
            locations=Locations(self.locations.__getitem__, numbers),
            sizes=tuple(int(size) for size in np.diff(ends, prepend=0)),
            selection=numbers if self.selection is None else self.selection[numbers],
            class_of=None if self.class_of is None else self.class_of[numbers],
        )
        # The parent's fingerprint covers the content; hashing the numbers is enough.
        digest = blake3(f"distrust selection 1\n{self.fingerprint}\n".encode())
        digest.update(numbers.astype("<i8").tobytes())
        return selected.with_cached(fingerprint=digest.hexdigest(), loss_tokens=self.loss_tokens[numbers])

    def with_cached(self, *, fingerprint: str, loss_tokens: NDArray[np.int64]) -> Corpus:
        """Fill the cached properties with values that are known already; returns self."""
        vars(self).update(fingerprint=fingerprint, loss_tokens=loss_tokens)  # as cached_property stores them
        return self

    def _arrays(self) -> dict[str, NDArray[np.generic]]:
        """The fingerprinted arrays, in the order in which they are hashed."""
        arrays = {name: getattr(self, name) for name in (*REQUIRED_ARRAYS, *OPTIONAL_ARRAYS)}
        return {name: array for name, array in arrays.items() if array is not None}


class Classes:
    """Numbers the source classes in the order in which they first appear."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The class names so far; one empty name if there are none."""
        return tuple(self._numbers) or ("",)

    def number(self, names: Iterable[str]) -> NDArray[np.int32]:
        """int32[k], the class numbers of the next k examples."""
        return np.array([self._number(name) for name in names], np.int32)

    def _number(self, name: str) -> int:
        if name not in self._numbers and len(self._numbers) >= MAX_CLASSES:
            name = OTHER_CLASSES  # the one number above the limit
        return self._numbers.setdefault(name, len(self._numbers))


def digest_arrays(n: int, total: int, arrays: Mapping[str, Iterable[Chunk]]) -> str:
    r"""The fingerprint of one source's corpus.

    BLAKE3 of ``distrust corpus 1\n``, n, total, then the required arrays, then each optional array that there
    is, after its name and ``\n``. Numbers are little-endian in the dtype that they have in a corpus
    (loss_mask one byte each, n and total 8 bytes).
    """
    digest = blake3(b"distrust corpus 1\n", max_threads=blake3.AUTO)
    digest.update(np.array([n, total], "<i8").tobytes())
    for name, array in arrays.items():
        if name in OPTIONAL_ARRAYS:
            digest.update(f"{name}\n".encode())
        for chunk in array:
            digest.update(chunk)
    return str(digest.hexdigest())


def add_sizes(digest: str, sizes: tuple[int, ...]) -> str:
    """The fingerprint of several sources: where each begins decides what is sampled from it."""
    if len(sizes) < 2:
        return digest
    return str(blake3(f"distrust sources 1\n{digest}\n{sizes}".encode()).hexdigest())


def blocks(array: NDArray[np.generic]) -> Iterator[Chunk]:
    """An array's bytes, little-endian, one block at a time."""
    for begin in range(0, len(array), BLOCK):
        part = array[begin : begin + BLOCK]
        little = part.astype(part.dtype.newbyteorder("<"), copy=False)
        yield np.ascontiguousarray(little).view(np.uint8).data


@dataclass(frozen=True, slots=True)
class Locations(Sequence[Location]):
    """Where n examples come from; each ``Location`` is built on access."""

    location_of: Callable[[int], Location]
    indices: Sequence[int] | NDArray[np.int64]  # [n], what ``location_of`` takes for each example

    @classmethod
    def from_arrays(cls, parts: Parts, part: NDArray[np.int32], line: NDArray[np.int64]) -> Locations:
        """The locations of n examples from the part [n] of each, and its line, row or index there [n]."""

        def get(example: int) -> Location:
            name, unit = parts[part[example]]
            return Location(name, int(line[example]), unit)

        return cls(get, range(len(part)))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, example: Any) -> Any:  # an index; nothing takes a slice of locations
        return self.location_of(int(self.indices[example]))


def split_off(corpus: Corpus, fraction: float, *, seed: int) -> tuple[Corpus, Corpus]:
    """Split a share of each source off for evaluation, a pure function of the seed.

    Args:
        corpus: all examples.
        fraction: the share, between 0 and 1; rounded for each source, at least one example in total.
        seed: determines which examples.

    Returns:
        Training and evaluation examples, disjoint.

    Raises:
        ConfigError: there are too few examples.
    """
    sizes = corpus.sizes or (len(corpus),)
    counts = [min(int(fraction * size + 0.5), size - 1) for size in sizes]  # leaves one to train on
    if not any(counts):
        counts[sizes.index(max(sizes))] = min(1, max(sizes) - 1)
    if not any(counts):
        raise ConfigError(f"--eval-fraction {fraction}: {len(corpus)} examples are too few to split one off")
    evaluated = np.zeros(len(corpus), np.bool_)  # [n]
    for source, (start, size, count) in enumerate(zip([0, *accumulate(sizes)], sizes, counts, strict=False)):
        shuffled = permutation(size, seed=derived_seed(seed, _SPLIT_STREAM + source), epoch=0)
        evaluated[start + shuffled[:count]] = True
    return corpus.select(np.flatnonzero(~evaluated)), corpus.select(np.flatnonzero(evaluated))
