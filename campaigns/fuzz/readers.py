"""What is promised of every way to read a file, whatever the file says.

- It ends normally, or in one of the library's errors that say what is wrong with the file. Nothing else is
  raised, and no warning but the library's own.
- Its time is bounded by the size of the file (of the processor: other programs do not count).
- What is taken for whole is what a writer makes: each tensor where dtype and shape say, no key twice.
- Messages and what commands print hold no character that commands a terminal, and messages are short.

:func:`in_memory` asks the parts that need no file, thousands of times in a second. :class:`Directory` has a
real file, and asks everything that a program or a person can.
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

from campaigns.fuzz import converting
from campaigns.fuzz.forging import METADATA, Specimen
from campaigns.fuzz.invariants import bound, only_what_is_promised, require, require_plain, seconds
from distrust import CheckpointManager
from distrust.checkpoint import CheckpointFile, catalog
from distrust.checkpoint.compare import differences
from distrust.checkpoint.files import checkpoint_file_name
from distrust.checkpoint.foreign import ForeignHeader
from distrust.checkpoint.format import ITEM_SIZES
from distrust.checkpoint.header import Header, header_length, parse_header
from distrust.checkpoint.tree import STATE_SECTIONS
from distrust.cli import main
from distrust.errors import CheckpointError, DistrustError

Answers = Counter[str]


def in_memory(raw: bytes, good: CheckpointFile, answers: Answers) -> None:
    """Ask everything that needs no file.

    Raises:
        CounterExample: if a promise was not kept.
    """
    began = seconds()
    answer = _in_memory(raw, good)
    took = seconds() - began
    require(took <= bound(len(raw)), f"{took:.1f} s for {len(raw):,} bytes in memory")
    answers[f"answers in memory: {answer}"] += 1


def _in_memory(raw: bytes, good: CheckpointFile) -> str:
    step = "parse_header"
    try:
        with only_what_is_promised("in memory"):
            header = parse_header(raw[: header_length(raw[:4096], len(raw))], len(raw))
            _shown(header)
            step = "tensors"
            _ = header.tensors
            step = "sections"
            _ = header.sections
            step = "require_intact"
            header.require_intact()
            require_sense(header, raw)
            differences(CheckpointFile(Path("forged"), header), good)
    except DistrustError as error:
        return f"{type(error).__name__} by {step}"
    return "whole"


def _shown(header: Header | ForeignHeader) -> None:
    """What a listing shows of it can be written down."""
    shown = [header.metrics, header.metadata, header.config, header.run_info, header.saved_metrics]
    json.dumps(shown, skipkeys=True, ensure_ascii=False).encode()


def require_sense(header: Header, raw: bytes) -> None:
    """That what was taken for whole is what a writer makes, told by other means than the reader's.

    Raises:
        CounterExample: if it is not.
    """
    specimen = Specimen(raw)
    fields = json.loads(specimen.body, object_pairs_hook=_each_key_once)
    state = json.loads(fields[METADATA]["state"], object_pairs_hook=_each_key_once)
    require({*state} == {"sections", "step"}, f"taken for whole, with a state of {[*state]!a}")
    require({*state["sections"]} == {*STATE_SECTIONS}, f"taken for whole, with {[*state['sections']]!a}")
    json.loads(fields[METADATA]["run"], object_pairs_hook=_each_key_once)
    _require_keys_differ(state)
    described = {name: field for name, field in fields.items() if name != METADATA}
    require({tensor.name for tensor in header.tensors} == described.keys(), "other tensors than in the file")
    end = specimen.end
    for tensor in header.tensors:
        field = described[tensor.name]
        begin = tensor.offset - specimen.end
        right = (
            tensor.offset == end
            and tensor.nbytes == ITEM_SIZES[tensor.dtype] * prod(tensor.shape)
            and all(type(size) is int and size >= 0 for size in field["shape"])
            and (field["dtype"], field["shape"]) == (tensor.dtype, list(tensor.shape))
            and field["data_offsets"] == [begin, begin + tensor.nbytes]
        )
        require(right, f"taken for whole, with the tensor {tensor.name!a} at {tensor.offset}")
        end += tensor.nbytes
    require(end == len(raw), f"taken for whole, with {len(raw)} bytes and tensors up to {end}")


_KEYS: dict[str, Callable[[str], Any]] = {
    "s": str, "i": int, "f": float, "b": lambda text: text == "True", "n": lambda _: None,
}  # fmt: skip


def _require_keys_differ(node: Any) -> None:
    """That no two keys of a dict of the state would become one, as 1 and True do."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        waiting += node.values() if type(node) is dict else node if type(node) is list else ()
        if type(node) is dict and [*node] == ["d"]:
            keys = {_KEYS[key[:1]](key[1:]) for key in node["d"]}
            require(len(keys) == len(node["d"]), f"taken for whole, with the keys {[*node['d']]!a}")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    require(len(dict(pairs)) == len(pairs), "taken for whole, with a key that stands twice")
    return dict(pairs)


class Directory:
    """A directory of checkpoints: a good one of step 0, and the hostile one of step 1.

    Args:
        path: of the directory, best in memory.
        good: the bytes of a good checkpoint of step 0.
        specimens: the hostile ones are made of these.
    """

    def __init__(self, path: Path, good: bytes, specimens: list[Specimen]) -> None:
        self.path = path
        self.specimens = specimens
        path.mkdir(parents=True, exist_ok=True)
        (path / checkpoint_file_name(0, "periodic")).write_bytes(good)
        self.good = catalog.read_header(path / checkpoint_file_name(0, "periodic"))
        self.hostile = path / checkpoint_file_name(1, "periodic")

    def ask(self, raw: bytes, answers: Answers) -> None:
        """Put a hostile file there, and ask everything of it.

        Raises:
            CounterExample: if a promise was not kept.
        """
        self.hostile.unlink(missing_ok=True)
        self.hostile.write_bytes(raw)
        self.ask_what_is_there(len(raw), answers)

    def ask_what_is_there(self, nbytes: int, answers: Answers) -> None:
        """Ask everything of what stands in the place of the hostile file.

        Raises:
            CounterExample: if a promise was not kept.
        """
        said: dict[str, str] = {}
        for name, use in self.uses().items():
            began = seconds()
            try:
                with only_what_is_promised(name):
                    use()
            except DistrustError as error:
                said[name] = type(error).__name__
            else:
                said[name] = "well"
            took = seconds() - began
            require(took <= bound(nbytes), f"{name}: {took:.1f} s for {nbytes:,} bytes")
            answers[f"answers from disk: {said[name]}"] += 1
        self._require_one_mind(said)

    def uses(self) -> dict[str, Callable[[], Any]]:
        """Every way to read the hostile file, by name."""
        manager = CheckpointManager(self.path)
        path = self.hostile
        return {
            "read_header": lambda: _shown(catalog.read_header(path).header),
            "inspect": lambda: manager.inspect(path).tensors,
            "scan": manager.scan,
            "validate": lambda: manager.validate(path),
            "load": lambda: manager.load(path),
            "load of the step": lambda: manager.load(1),
            "load mapped": lambda: manager.load(path, mmap=True),
            "load lazily": lambda: touched(manager.load(path, mmap=True, verify="lazy")),
            "load_latest": lambda: self._load_latest(manager),
            "load_best": manager.load_best,
            "differences": lambda: differences(catalog.read_header(path), self.good),
            "distrust ls": lambda: command("ls", self.path),
            "distrust ls FILE": lambda: command("ls", path, "--json"),
            "distrust show": lambda: command("show", path, "--tensors"),
            "distrust show --json": lambda: command("show", path, "--json"),
            "distrust diff": lambda: command("diff", path, self.good.path),
            "distrust diff --json": lambda: command("diff", self.good.path, path, "--json"),
            "distrust verify": lambda: command("verify", self.path),
            "convert": self._convert,
            "distrust convert": self._command_convert,
        }

    def _load_latest(self, manager: CheckpointManager) -> None:
        loaded = manager.load_latest()
        require(loaded.step in (0, 1), f"load_latest came back with step {loaded.step}")

    def _convert(self) -> None:
        with converting.target(self.path.parent) as to:
            done = converting.converted(self.hostile, to)
        is_whole = True
        try:
            catalog.verify(self.hostile)
        except CheckpointError:
            is_whole = False
        for one in done:
            damaged = one.outcome in ("damaged", "unreadable")
            require(damaged is not is_whole, f"convert takes it for {one.outcome}, and verify does not")

    def _command_convert(self) -> None:
        with converting.target(self.path.parent) as to:
            command("convert", self.hostile, "--to", to)

    def _require_one_mind(self, said: dict[str, str]) -> None:
        readers = {said[name] for name in ("validate", "load", "load mapped", "load lazily")}
        require(len(readers) == 1, f"some take it for whole and others do not: {said}")
        require(said["load_latest"] in ("well", "UnsupportedVersion"), f"no fall back: {said}")


def touched(loaded: Any) -> None:
    """Touch every tensor of a checkpoint that was loaded lazily."""
    for section in (loaded.model, loaded.optimizer, loaded.rng, loaded.history):
        section.copy()


def command(*arguments: object) -> None:
    """Run one of the commands; what it prints is fit for a terminal."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    require(code in (0, 1), f"exit code {code}: {err.getvalue()[:500]!r}")
    require_plain("what is printed", out.getvalue() + err.getvalue())
