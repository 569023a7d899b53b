"""Hostile data, logs and settings: lines without an end, deep and repeated JSON, bombs in gzip and Parquet.

Each family changes a valid file of one of the formats that the commands read. Then a command reads it: it
must end in bounded time and memory, whatever the file says (``workplace``).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from campaigns.fuzz import corruptions, families
from campaigns.fuzz.workplace import CODE, Workplace

TEXTS = "data, logs and settings"  # label of the counts
RANDOM_TEXTS = 40  # in a case
REPETITIONS = 12  # of a family on each file
#: Of a bomb, unpacked: several times what a worker may take.
BOMB_BYTES = 3 << 30
#: To unpack it, if it is read to its end: memory is bounded by the file, time by what it unpacks to.
_UNPACKING_SECONDS = 30.0
_PIECE = bytes(1 << 20)
_LONG_LINE = 40 << 20  # more than a line may have


class Target(NamedTuple):
    """A file that a command reads, and in which form."""

    path: str
    form: str
    command: str


TARGETS = (
    Target("run/metrics.jsonl", "lines", "report"),
    Target("run/metrics.jsonl", "lines", "plot"),
    Target("run/metrics.jsonl", "lines", "train: resume"),
    Target("run/provenance.json", "object", "report"),
    Target("run/wandb-run-id", "text", "train: dashboards"),
    Target("data/records.jsonl", "lines", "weigh"),
    Target("data/records.jsonl", "lines", "weigh and write"),
    Target("data/records.jsonl", "lines", "train"),
    Target("data/records.json", "list", "weigh"),
    Target("data/records.csv", "table", "weigh"),
    Target("data/records.tsv", "table", "weigh"),
    Target("data/records.jsonl.gz", "gzip", "weigh"),
    Target("data/records.parquet", "parquet", "weigh"),
    Target("table.toml", "toml", "weigh and write"),
    Target("config.toml", "toml", "train: another folder of data"),
    Target("older/checkpoint-1/metadata.json", "object", "convert"),
)


class Victim(NamedTuple):
    """A valid file, to be changed."""

    path: Path
    form: str
    rng: Random
    records: list[dict[str, Any]]  # its content, or that of the records
    objects: list[dict[str, Any]]  # the content of a file in JSON


Family = Callable[[Victim], None]


def _as_lines(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _write(path: Path, form: str, records: list[Any]) -> None:
    """Write a valid file in a form."""
    if form == "table":
        text = io.StringIO()
        table = csv.DictWriter(text, list(records[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writeheader()
        table.writerows(records)
        path.write_text(text.getvalue())
    elif form == "gzip":
        path.write_bytes(gzip.compress(_as_lines(records), mtime=0))
    elif form == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif form == "list":
        path.write_text(json.dumps(records))
    elif form == "lines":
        path.write_bytes(_as_lines(records))
    elif form == "object":
        path.write_text(json.dumps(records[0]))


def _fields(victim: Victim) -> None:
    """JSON, or rows, with other values, keys and nesting."""
    objects = victim.objects
    for _ in range(victim.rng.choice((1, 1, 2))):
        families.replace_one(objects, victim.rng, families.any_value)
    _write(victim.path, victim.form, objects)


def _snippets(victim: Victim) -> None:
    """Text that no writer produces, somewhere."""
    raw, rng = _content(victim), victim.rng
    for _ in range(rng.choice((1, 1, 4))):
        begin = rng.randrange(len(raw) + 1)
        snippets = (b'"', b"\n", b"\r", b"\0", b"\x1b[2J", b"=", b"'''", CODE.encode())
        snippet = rng.choice((*families.JSON_SNIPPETS, *snippets))
        raw = raw[:begin] + snippet + raw[begin + rng.choice((0, len(snippet))) :]
    _store(victim, raw)


def _sizes(victim: Victim) -> None:
    """Too long a line, key, number or list; too many of them; too deep."""
    rng = victim.rng
    size = rng.choice((1 << 12, 1 << 16, 1 << 20))
    deep = rng.choice((100, 1000, 100_000))
    letter = rng.choice((b"a", b'"', b"\n", b",", b"\0", b"\\u0000", b"[", b"\xff", b"9"))
    _store(victim, rng.choice((
        letter * size, b'{"text": "' + letter * size, b'{"' + letter * size + b'": 1}\n', b"[" * deep,
        b'{"a":' * deep, b'{"step":' + b"9" * min(size, 1 << 16) + b"}\n", b'{"text":1}\n' * (size // 8),
        _content(victim) + letter * size, _content(victim) * (size >> 12), b"a = " + b"[" * deep,
        b"a." * deep + b"b = 1\n", b"\xef\xbb\xbf" + _content(victim), _content(victim) + b"\xff\xfe",
        _content(victim).decode(errors="replace").encode("utf-16"),
        b",".join([b"text"] * (size >> 4)) + b"\n",
    )))  # fmt: skip


def _long_line(victim: Victim) -> None:
    """A line that is longer than any may be."""
    start = victim.rng.choice((b'{"text": "', b"", b'text\n"', b"[", b'{"step": 1, "loss": '))
    _store(victim, start + b"a" * _LONG_LINE)


def _sparse(victim: Victim) -> None:
    """A tebibyte of zeros after the content."""
    with victim.path.open("r+b") as file:
        file.truncate(1 << 40)


def _bomb(victim: Victim) -> None:
    """A small archive or table with gigabytes in it."""
    make = {"gzip": _bomb_gzip, "parquet": _bomb_parquet}
    if victim.form not in make:
        raise LookupError("nothing to unpack")
    make[victim.form](victim)


def _bomb_gzip(victim: Victim) -> None:
    """Its checksum is wrong, which shows only at its end."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    start = victim.rng.choice((b'{"text": "', b"", b"[" * 1000, _content(victim)))
    packed = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
    piece = victim.rng.choice((_PIECE, b"a" * len(_PIECE), b" " * len(_PIECE)))
    repeated = packer.compress(piece) + packer.flush(zlib.Z_FULL_FLUSH)
    victim.path.write_bytes(packed + repeated * (BOMB_BYTES >> 20) + packer.flush())


def _bomb_parquet(victim: Victim) -> None:
    """One long text in many rows: of a dictionary, a page holds an index for each."""
    import pyarrow
    import pyarrow.parquet

    rng = victim.rng
    length = rng.choice((1 << 10, 1 << 16, 1 << 20, 16 << 20))
    rows = min(BOMB_BYTES // length, 200_000)
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), ["a" * length])
    if rng.random() < 0.3:
        text = pyarrow.array(["a" * length] * min(rows, (64 << 20) // length or 1))
    table = pyarrow.table({"text": text})
    options = {"compression": rng.choice(("zstd", "gzip", "snappy", "none")), "row_group_size": rows}
    pyarrow.parquet.write_table(table, victim.path, **options)


def _corrupt(change: corruptions.Corruption, victim: Victim) -> None:
    change(victim.path, victim.rng)


def _content(victim: Victim) -> bytes:
    raw = victim.path.read_bytes()
    return gzip.decompress(raw) if victim.form == "gzip" else raw


def _store(victim: Victim, raw: bytes) -> None:
    """Write a content; into an archive, if it was in one, and sometimes into one that is inconsistent."""
    if victim.form == "gzip":
        raw = gzip.compress(raw, 1, mtime=0)
        if victim.rng.random() < 0.2:
            raw = victim.rng.choice(
                (raw + raw, raw[:-4] + b"\xff" * 4, raw[:-8], raw + b"x", gzip.compress(raw))
            )
    victim.path.write_bytes(raw)


FAMILIES: dict[str, Family] = {
    "texts: fields": _fields,
    "texts: snippets": _snippets,
    "texts: sizes": _sizes,
    "texts: long lines": _long_line,
    "texts: sparse": _sparse,
    "texts: bombs": _bomb,
    **{f"texts: {name}": partial(_corrupt, change) for name, change in corruptions.BY_NAME.items()},
}
#: These take longer, or need no second try.
_SLOW = {"texts: long lines": 1, "texts: sparse": 1, "texts: bombs": 4}
_COMMON = [name for name in FAMILIES if name not in _SLOW]


def try_family(workplace: Workplace, family: str, rng: Random) -> Counter[str]:
    """One family, a few times on each file."""
    counts: Counter[str] = Counter()
    for target in TARGETS:
        for _ in range(_SLOW.get(family, REPETITIONS)):
            counts += _try_one(workplace, target, family, rng)
    return counts


def try_at_random(workplace: Workplace, rng: Random, *, texts: int = RANDOM_TEXTS) -> Counter[str]:
    counts: Counter[str] = Counter()
    for _ in range(texts):
        counts += _try_one(workplace, rng.choice(TARGETS), rng.choice(_COMMON), rng)
    return counts


def _try_one(workplace: Workplace, target: Target, family: str, rng: Random) -> Counter[str]:
    workplace.renew()
    path = workplace.inside / target.path
    records = _parse(workplace.inside / "data/records.jsonl")
    if not path.exists():  # another form of the records
        _write(path, target.form, records)
        (workplace.inside / "data/records.jsonl").unlink()
    objects = _parse(path) if target.form in ("lines", "object") else records
    try:
        FAMILIES[family](Victim(path, target.form, rng, records, objects))
    except (*families.NOTHING_TO_CHANGE, OSError):
        return Counter()
    except Exception as error:  # Arrow has errors of its own, for what it does not write
        if type(error).__module__.startswith("pyarrow"):
            return Counter()
        raise
    if workplace.would_wait(target.path):
        return Counter()
    label = f"{family.removeprefix('texts: ')} of {target.path}"
    unpacking = _UNPACKING_SECONDS if target.form in ("gzip", "parquet") else 0
    answers = workplace.try_out(target.command, label, unpacking=unpacking)
    return Counter({f"{TEXTS}: {answer}": count for answer, count in answers.items()})


def _parse(path: Path) -> list[Any]:
    text = path.read_text()
    return [json.loads(text)] if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
