"""Every method to read a file, and what must hold for each, whatever the file contains.

It ends normally or in an error of the library about the file, in time bounded by the file's size. An accepted
file is one that a writer makes. Output holds no control character of a terminal. :func:`read_in_memory` calls
what needs no file; :class:`Directory` does everything that a program or a person can.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from campaigns.campaign import require
from campaigns.fuzz import converting
from campaigns.fuzz.forging import METADATA, Specimen
from campaigns.fuzz.invariants import bound, only_documented_errors, require_plain, seconds
from distrust import CheckpointManager
from distrust.checkpoint import CheckpointFile, catalog
from distrust.checkpoint.compare import differences
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.format import ITEM_SIZES
from distrust.checkpoint.header import header_length, parse_header
from distrust.checkpoint.tree import STATE_SECTIONS
from distrust.cli import main
from distrust.errors import CheckpointError, DistrustError

Answers = Counter[str]


def read_in_memory(raw: bytes, valid: CheckpointFile, answers: Answers) -> None:
    """Call everything that needs no file."""
    began = seconds()
    answer = _parse(raw, valid)
    elapsed = seconds() - began
    require(elapsed <= bound(len(raw)), f"{elapsed:.1f} s for {len(raw):,} bytes in memory")
    answers[f"answers in memory: {answer}"] += 1


def _parse(raw: bytes, valid: CheckpointFile) -> str:
    """``intact``, or which error was raised where."""
    step = "parse_header"
    try:
        with only_documented_errors("in memory"):
            header = parse_header(raw[: header_length(raw[:4096], len(raw))], len(raw))
            _dump_listing(header)
            for step in ("tensors", "sections"):
                getattr(header, step)
            step = "require_intact"
            header.require_intact()
            require_sense(header, raw)
            differences(CheckpointFile(Path("forged"), header), valid)
    except DistrustError as error:
        return f"{type(error).__name__} by {step}"
    return "intact"


def _dump_listing(header: Any) -> None:
    """What a listing shows of a file can be encoded."""
    shown = [header.metrics, header.metadata, header.config, header.run_info, header.saved_metrics]
    json.dumps(shown, skipkeys=True, ensure_ascii=False).encode()


def require_sense(header: Any, raw: bytes) -> None:
    """Require that a file that was accepted is one that a writer makes, by other means than the reader's."""
    specimen = Specimen(raw)
    fields = json.loads(specimen.body, object_pairs_hook=_unique_keys)
    state = json.loads(fields[METADATA]["state"], object_pairs_hook=_unique_keys)
    require({*state} == {"sections", "step"}, f"accepted, with a state of {[*state]!a}")
    require({*state["sections"]} == {*STATE_SECTIONS}, f"accepted, with {[*state['sections']]!a}")
    json.loads(fields[METADATA]["run"], object_pairs_hook=_unique_keys)
    _require_distinct_keys(state)
    described = {name: field for name, field in fields.items() if name != METADATA}
    require({tensor.name for tensor in header.tensors} == described.keys(), "other tensors than in the file")
    end = specimen.end
    for tensor in header.tensors:
        field = described[tensor.name]
        begin = tensor.offset - specimen.end
        consistent = (
            tensor.offset == end
            and tensor.nbytes == ITEM_SIZES[tensor.dtype] * prod(tensor.shape)
            and all(type(size) is int and size >= 0 for size in field["shape"])
            and (field["dtype"], field["shape"]) == (tensor.dtype, list(tensor.shape))
            and field["data_offsets"] == [begin, begin + tensor.nbytes]
        )
        require(consistent, f"accepted, with the tensor {tensor.name!a} at {tensor.offset}")
        end += tensor.nbytes
    require(end == len(raw), f"accepted, with {len(raw)} bytes and tensors up to {end}")


_KEYS: dict[str, Callable[[str], Any]] = {
    "s": str, "i": int, "f": float, "b": lambda text: text == "True", "n": lambda _: None,
}  # fmt: skip


def _require_distinct_keys(tree: Any) -> None:
    """No two keys of a dict of the state are equal in Python, as 1 and True are."""
    pending = [tree]
    while pending:
        node = pending.pop()
        pending += node.values() if type(node) is dict else node if type(node) is list else ()
        if type(node) is dict and [*node] == ["d"]:
            keys = {_KEYS[key[:1]](key[1:]) for key in node["d"]}
            require(len(keys) == len(node["d"]), f"accepted, with the keys {[*node['d']]!a}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    require(len(dict(pairs)) == len(pairs), "accepted, with a duplicate key")
    return dict(pairs)


class Directory:
    """A directory of checkpoints: a valid one of step 0, and the hostile one of step 1."""

    def __init__(self, path: Path, valid: bytes, specimens: list[Specimen]) -> None:
        self.path = path  # of the directory, best in memory
        self.specimens = specimens  # the hostile ones are made of these
        path.mkdir(parents=True, exist_ok=True)
        file = path / checkpoint_file_name(0, "periodic")
        file.write_bytes(valid)
        self.valid = catalog.read_header(file)  # the bytes of a valid checkpoint of step 0
        self.hostile = path / checkpoint_file_name(1, "periodic")

    def read(self, raw: bytes, answers: Answers) -> None:
        """Write a hostile file, and read it by every method."""
        self.hostile.unlink(missing_ok=True)
        self.hostile.write_bytes(raw)
        self.read_all(len(raw), answers)

    def read_all(self, nbytes: int, answers: Answers) -> None:
        """Read what is in the place of the hostile file by every method."""
        results: dict[str, str] = {}
        for name, use in self.uses().items():
            began = seconds()
            results[name] = "ok"
            try:
                with only_documented_errors(name):
                    use()
            except DistrustError as error:
                results[name] = type(error).__name__
            elapsed = seconds() - began
            require(elapsed <= bound(nbytes), f"{name}: {elapsed:.1f} s for {nbytes:,} bytes")
            answers[f"answers from disk: {results[name]}"] += 1
        self._require_agreement(results)

    def uses(self) -> dict[str, Callable[[], Any]]:
        """Every method to read the hostile file, by name."""
        manager = CheckpointManager(self.path)
        path = self.hostile
        return {
            "read_header": lambda: _dump_listing(catalog.read_header(path).header),
            "inspect": lambda: manager.inspect(path).tensors,
            "scan": manager.scan,
            "validate": lambda: manager.validate(path),
            "load": lambda: manager.load(path),
            "load of the step": lambda: manager.load(1),
            "load mapped": lambda: manager.load(path, mmap=True),
            "load lazily": lambda: touch_all(manager.load(path, mmap=True, verify="lazy")),
            "load_latest": lambda: require(manager.load_latest().step in (0, 1), "load_latest: another step"),
            "load_best": manager.load_best,
            "differences": lambda: differences(catalog.read_header(path), self.valid),
            "distrust ls": lambda: command("ls", self.path),
            "distrust ls FILE": lambda: command("ls", path, "--json"),
            "distrust show": lambda: command("show", path, "--tensors"),
            "distrust show --json": lambda: command("show", path, "--json"),
            "distrust diff": lambda: command("diff", path, self.valid.path),
            "distrust diff --json": lambda: command("diff", self.valid.path, path, "--json"),
            "distrust verify": lambda: command("verify", self.path),
            "convert": self._convert,
            "distrust convert": self._convert_by_command,
        }

    def _convert(self) -> None:
        with converting.target(self.path.parent) as target:
            results = converting.convert_and_check(self.hostile, target)
        intact = True
        try:
            catalog.verify(self.hostile)
        except CheckpointError:
            intact = False
        for result in results:
            damaged = result.outcome in ("damaged", "unreadable")
            require(damaged is not intact, f"convert reports it as {result.outcome}, and verify does not")

    def _convert_by_command(self) -> None:
        with converting.target(self.path.parent) as target:
            command("convert", self.hostile, "--to", target)

    def _require_agreement(self, results: dict[str, str]) -> None:
        answers = {results[name] for name in ("validate", "load", "load mapped", "load lazily")}
        require(len(answers) == 1, f"some accept it and others do not: {results}")
        require(results["load_latest"] in ("ok", "UnsupportedVersion"), f"no fall back: {results}")


def touch_all(loaded: Any) -> None:
    """Touch every tensor of a checkpoint that was loaded lazily."""
    for section in (loaded.model, loaded.optimizer, loaded.rng, loaded.history):
        section.copy()


def command(*arguments: object) -> None:
    """Run a command; what it prints must be safe for a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    require(code in (0, 1), f"exit code {code}: {err.getvalue()[:500]!r}")
    require_plain("what is printed", out.getvalue() + err.getvalue())
