"""What is compared: each operation with its limit, ours and the other libraries; and our targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from benchmarks.commands import FEW, MANY
from benchmarks.results import Figure, Figures, Results
from benchmarks.states import COMMANDS, TENSORS, Spec

RETURNS, DURABLE, EXTRA = "returns_seconds", "durable_seconds", "extra_bytes"

RAW_WRITE = Figure("raw write, 2 in flight")
HOT_COPY = Figure("copy, one thread")
COLD_READ = (Figure("read, cold"), Figure("read, cold, direct"))
BLAKE3 = Figure("BLAKE3, all cores")
SAVE = Figure("distrust save")
RETURN = Figure("distrust background", RETURNS)
BEHIND = Figure("distrust background", DURABLE)
LOAD_WARM, LOAD_COLD = Figure("distrust load warm"), Figure("distrust load cold")
MAPPED_WARM, MAPPED_COLD = Figure("distrust mmap load warm"), Figure("distrust mmap load cold")
INSPECT, KEYS = Figure("distrust inspect"), Figure("safetensors keys")
START = Figure("python -c pass")

Kind = Literal["ours", "peer", "limit"]


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table.

    Attributes:
        label: library and method.
        figure: what was measured.
        kind: ours, a limit, or another library.
    """

    label: str
    figure: Figure
    kind: Kind


@dataclass(frozen=True, slots=True)
class Operation:
    """Figures that are compared.

    Attributes:
        title: of the operation.
        limit: the least time that it can take.
        ours: what the other libraries are compared with.
        rows: in the order of the table.
    """

    title: str
    limit: Figures
    ours: Figure
    rows: tuple[Row, ...]


def _safetensors_loads(heat: str) -> dict[str, str]:
    return {
        "safetensors, load_file pread": f"safetensors load {heat}",
        "safetensors, load_file + clone": f"safetensors clone load {heat}",
        "safetensors, load(bytes)": f"safetensors bytes load {heat}",
    }


def _loads(heat: str) -> dict[str, str]:
    return {
        **_safetensors_loads(heat),
        "torch.load, weights only": f"torch load {heat}",
        "DCP, in place": f"dcp load {heat}",
        "orbax": f"orbax load {heat}",
    }


def _rows(kind: Kind, cases: dict[str, str], figure: str = "seconds") -> tuple[Row, ...]:
    return tuple(Row(label, Figure(case, figure), kind) for label, case in cases.items())


_BEHIND = {
    "DCP async_save": "dcp background",
    "DCP async_save, cached, 2nd save": "dcp background cached",
    "orbax, immutable arrays": "orbax background",
}
_THREADS = ("one thread", "all cores")
_RAW_WRITES = {f"raw O_DIRECT write + fsync, {n} in flight": f"raw write, {n} in flight" for n in (1, 2, 3)}
#: The fastest way to make a private copy is the one that we are compared with.
SAFETENSORS_WARM: Figures = tuple(map(Figure, _safetensors_loads("warm").values()))
SAFETENSORS_COLD: Figures = tuple(map(Figure, _safetensors_loads("cold").values()))

OPERATIONS = (
    Operation(
        "save, blocking, durable",
        RAW_WRITE,
        SAVE,
        (
            Row("distrust, with digests", SAVE, "ours"),
            *_rows(
                "peer",
                {
                    "safetensors + fsync": "safetensors save",
                    "torch.save + fsync": "torch save",
                    "DCP save, sync_files": "dcp save",
                    "orbax": "orbax save",
                    "transformers Trainer, no fsync": "trainer save",
                },
            ),
            *_rows("limit", _RAW_WRITES),
        ),
    ),
    Operation(
        "save in the background, returns",
        HOT_COPY,
        RETURN,
        (
            Row("distrust, first save", RETURN, "ours"),
            Row("distrust, overlap=True", Figure("distrust overlap", RETURNS), "ours"),
            *_rows("peer", _BEHIND, RETURNS),
            *_rows("limit", {f"hot copy, {threads}": f"copy, {threads}" for threads in _THREADS}),
        ),
    ),
    Operation(
        "save in the background, durable",
        RAW_WRITE,
        BEHIND,
        (
            Row("distrust, with digests", BEHIND, "ours"),
            Row("distrust, overlap=True", Figure("distrust overlap", DURABLE), "ours"),
            *_rows("peer", _BEHIND, DURABLE),
        ),
    ),
    Operation(
        "load, warm",
        Figure("read, cached, touched memory"),  # fresh memory may be ten times slower, by chance
        LOAD_WARM,
        (
            Row("distrust, verified", LOAD_WARM, "ours"),
            *_rows("peer", _loads("warm")),
            *_rows(
                "limit",
                {
                    "page cache into fresh memory": "read, cached, fresh memory",
                    "page cache into touched memory": "read, cached, touched memory",
                },
            ),
        ),
    ),
    Operation(
        "load as views, warm",
        BLAKE3,
        MAPPED_WARM,
        (
            Row("distrust, mmap=True, verified", MAPPED_WARM, "ours"),
            *_rows("limit", {f"BLAKE3, {threads}": f"BLAKE3, {threads}" for threads in _THREADS}),
        ),
    ),
    Operation(
        "load, cold",
        COLD_READ,
        LOAD_COLD,
        (
            Row("distrust, verified", LOAD_COLD, "ours"),
            Row("distrust, mmap=True, verified", MAPPED_COLD, "ours"),
            *_rows("peer", _loads("cold")),
            *_rows(
                "limit",
                {"read through the page cache": "read, cold", "O_DIRECT, 2 in flight": "read, cold, direct"},
            ),
        ),
    ),
    Operation(
        "header",
        KEYS,
        INSPECT,
        (
            Row("distrust inspect, checked", INSPECT, "ours"),
            Row("safetensors safe_open + keys()", KEYS, "peer"),
        ),
    ),
    Operation(
        "list",
        START,
        Figure(f"distrust ls, {FEW} checkpoints"),
        (
            Row(f"distrust ls, {FEW} checkpoints", Figure(f"distrust ls, {FEW} checkpoints"), "ours"),
            Row(f"distrust ls, {MANY:,} checkpoints", Figure(f"distrust ls, {MANY} checkpoints"), "ours"),
            Row("python -c pass", START, "limit"),
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """A target.

    Attributes:
        text: for people.
        values: of each repeat.
        bound: of their median.
        at_least: whether the bound is a minimum or a maximum.
        fits: the states that it applies to.
        best_of: the alternatives whose fastest is named in the title.
    """

    text: str
    values: Callable[[Results, Spec], list[float]]
    bound: float
    at_least: bool
    fits: Callable[[Spec], bool]
    best_of: Figures | None = None

    def is_reached(self, value: float) -> bool:
        """Whether a median satisfies the bound."""
        return value >= self.bound if self.at_least else value <= self.bound


def _over(above: Figures, below: Figures) -> Callable[[Results, Spec], list[float]]:
    return lambda results, spec: results.ratios(spec, above, below)


def _bulk(spec: Spec) -> bool:
    return spec.tensors == TENSORS and not spec.lora


def _lora(spec: Spec) -> bool:
    return spec.lora


def _state(spec: Spec) -> bool:
    return spec != COMMANDS


def _commands(spec: Spec) -> bool:
    return spec == COMMANDS


def _mebibytes(figure: Figure) -> Callable[[Results, Spec], list[float]]:
    return lambda results, spec: [value / 2**20 for value in results.values(spec, figure)]


def _of_state(figure: Figure) -> Callable[[Results, Spec], list[float]]:
    return lambda results, spec: [value / spec.nbytes for value in results.values(spec, figure)]


def _seconds(figure: Figure) -> Callable[[Results, Spec], list[float]]:
    return lambda results, spec: results.values(spec, figure)


AT_LEAST, AT_MOST = True, False
_FEW, _MANY = OPERATIONS[-1].rows[0].figure, OPERATIONS[-1].rows[1].figure

TARGETS = (
    Target("blocking save: speed relative to the raw write", _over(RAW_WRITE, SAVE), 0.9, AT_LEAST, _bulk),
    Target(
        "blocking save: times as fast as safetensors + fsync",
        _over(Figure("safetensors save"), SAVE), 1.4, AT_LEAST, _bulk,
    ),
    Target("blocking save: times as fast as DCP", _over(Figure("dcp save"), SAVE), 2.8, AT_LEAST, _bulk),
    Target(
        "save_async returns: time relative to a hot copy, one thread",
        _over(RETURN, HOT_COPY), 1.25, AT_MOST, _bulk,
    ),
    Target(
        "save_async returns: time relative to DCP with a cached stager",
        _over(RETURN, Figure("dcp background cached", RETURNS)), 1.0, AT_MOST, _bulk,
    ),
    Target(
        "save_async durable: time relative to the blocking save",
        _over(BEHIND, SAVE), 1.3, AT_MOST, _bulk,
    ),
    Target(
        "load, warm: time relative to",
        _over(LOAD_WARM, SAFETENSORS_WARM), 1.0, AT_MOST, _bulk, SAFETENSORS_WARM,
    ),
    Target("load as views, warm: speed relative to BLAKE3", _over(BLAKE3, MAPPED_WARM), 0.8, AT_LEAST, _bulk),
    Target("load, cold: speed relative to", _over(COLD_READ, LOAD_COLD), 0.9, AT_LEAST, _bulk, COLD_READ),
    Target(
        "peak extra memory, blocking save (MiB)",
        _mebibytes(Figure(SAVE.case, EXTRA)), 64, AT_MOST, _bulk,
    ),
    Target(
        "peak extra memory, background save (relative to the state)",
        _of_state(Figure(BEHIND.case, EXTRA)), 1.02, AT_MOST, _bulk,
    ),
    Target("blocking save: time relative to the raw write", _over(SAVE, RAW_WRITE), 1.1, AT_MOST, _lora),
    Target(
        "save_async returns: time relative to a hot copy, one thread",
        _over(RETURN, HOT_COPY), 1.5, AT_MOST, _lora,
    ),
    Target(
        "inspect: time relative to safetensors' safe_open + keys()",
        _over(INSPECT, KEYS), 2.0, AT_MOST, _state,
    ),
    Target(f"ls of {FEW}: time relative to starting Python", _over(_FEW, START), 5.0, AT_MOST, _commands),
    Target(f"ls of {MANY:,}: seconds", _seconds(_MANY), 2.0, AT_MOST, _commands),
)  # fmt: skip
