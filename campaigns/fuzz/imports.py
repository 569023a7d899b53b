"""Hostile folders of other programs: of the transformers Trainer, and adapters of peft and of mlx-lm.

Each family harms a good one of some kind, made once. The older formats are among the kinds, with weights
that fit the model: what is wrong in them may be seen by an engine only. Each is converted
(``converting``), and what was converted is trained on (``training``).
"""

from __future__ import annotations

import collections
import copy
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from campaigns.fuzz import corruptions, families, older
from distrust.bundled import MODEL

#: Steps that were made of each that has an optimizer.
STEPS = 3
RANK = 2
_STATE, _OPTIMIZER = "trainer_state.json", "optimizer.pt"
_JSON = (_STATE, "adapter_config.json", "config.json", "metadata.json")
_TENSORS = ("adapter_model.safetensors", "adapters.safetensors", "model.safetensors")
#: More than an adapter's config may have.
_LARGE_TEXT = b" " * (5 << 20)
_NUMBERS = (0.0, -1.0, 1e-45, 3e38, float("inf"), float("nan"))


class Fixtures(NamedTuple):
    """The good ones.

    Attributes:
        base: folder of the model that all of them were trained on.
        kinds: by name, where one is, under the name that it has to have.
        fields: what an older format says beside its arrays.
        weights: of the adapter, by peft's names.
        moments: by the letter of the moment and a name.
    """

    base: Path
    kinds: dict[str, Path]
    fields: dict[str, Any]
    weights: dict[str, Any]
    moments: dict[str, Any]


class Victim(NamedTuple):
    """One that is to be harmed.

    Attributes:
        path: of the copy; its folder has room for more.
        kind: of it.
        good: what it was made of.
        rng: every random choice.
    """

    path: Path
    kind: str
    good: Fixtures
    rng: Random

    @property
    def canary(self) -> Path:
        """A file that no reader may write."""
        return self.path.parent / "unpickled"

    def sign(self) -> None:
        """Give it the checksums that are right, if it has some."""
        if self.kind == "directory":
            older.sign(self.path)

    def one_of(self, names: tuple[str, ...]) -> Path:
        """One of these files that is there."""
        return self.rng.choice([file for name in names if (file := self.path / name).exists()])

    def any_file(self) -> Path:
        """One of its files, or itself if it is one."""
        return self.rng.choice(sorted(self.path.iterdir())) if self.path.is_dir() else self.path


Family = Callable[[Victim], None]


def base_of(directory: Path) -> Path:
    """Where :func:`make` puts the model."""
    return directory / "base"


def make(directory: Path) -> Fixtures:
    """A model of one narrow layer, and one of each kind that was trained on it.

    Args:
        directory: where they are written; it may hold nothing else.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    base = base_of(directory)
    shutil.copytree(MODEL, base, ignore=shutil.ignore_patterns("model.safetensors"))
    small = {"hidden_size": 16, "head_dim": 8, "intermediate_size": 24, "num_hidden_layers": 1}
    config = AutoConfig.from_pretrained(base, **small, num_attention_heads=2, num_key_value_heads=2)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(base)
        whole, trainer, adapter = (directory / name / "checkpoint-3" for name in ("whole", "trainer", "peft"))
        shutil.copytree(base, whole)
        _train(model, whole)
        model.save_pretrained(whole)
        # Of the base as it was saved, not as it is now: the names alone matter.
        lora = LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
        trainer.mkdir(parents=True)
        moments = _train(adapted, trainer)
        adapted.save_pretrained(trainer)
    adapted.save_pretrained(adapter)
    names = {n: n.replace(".default", "") for n, p in adapted.named_parameters() if p.requires_grad}
    weights = {names[n]: p.detach().numpy().copy() for n, p in adapted.named_parameters() if n in names}
    moments = {f"{name[:2]}{names[name[2:]]}": array for name, array in moments.items()}
    good = Fixtures(base, {}, _fields(), weights, moments)
    good.kinds.update({"trainer": trainer, "whole": whole, "peft": adapter})
    if find_spec("mlx_lm") is not None:
        good.kinds["mlx-lm"] = _mlx_adapter(good, directory / "mlx-lm" / "adapter")
    for kind, name in (("directory", "checkpoint-3"), ("byte tensors", "checkpoint-3.safetensors")):
        good.kinds[kind] = directory / kind / name
        good.kinds[kind].parent.mkdir()
        _write_older(good.kinds[kind], kind, good.fields, good.weights, good.moments)
    return good


def _train(model: Any, folder: Path) -> dict[str, Any]:
    """Some steps of AdamW on noise, saved as the Trainer does; returns the moments by name."""
    import torch

    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    groups = [
        {
            "params": [value for value in trained.values() if (value.ndim >= 2) == matrices],
            "weight_decay": decay,
        }
        for matrices, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _ in range(STEPS):
        for value in trained.values():
            value.grad = torch.randn_like(value)
        optimizer.step()
    torch.save(optimizer.state_dict(), folder / _OPTIMIZER)
    log = [{"step": at, "loss": 2.5, "grad_norm": 1.0, "learning_rate": 1e-3} for at in range(1, STEPS + 1)]
    state = {"global_step": STEPS, "max_steps": 9, "epoch": 1.5, "num_input_tokens_seen": 96}
    (folder / _STATE).write_text(json.dumps({**state, "best_metric": None, "log_history": log}))
    return {
        f"{moment}.{name}": optimizer.state[value][part].numpy().copy()
        for name, value in trained.items()
        for moment, part in (("m", "exp_avg"), ("v", "exp_avg_sq"))
    }


def _mlx_adapter(good: Fixtures, path: Path) -> Path:
    path.mkdir(parents=True)
    arrays = {
        _as_in_mlx(name): ("F32", [*array.T.shape], array.T.tobytes()) for name, array in good.weights.items()
    }
    (path / "adapters.safetensors").write_bytes(corruptions.pack_safetensors(arrays))
    described = {"rank": RANK, "scale": 4.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": described}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def _as_in_mlx(name: str) -> str:
    inner = name.removeprefix("base_model.model.")
    return inner.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")


def _fields() -> dict[str, Any]:
    return {
        "step": STEPS,
        "timestamp": 1764000010.0,
        "loss_history": [2.5, 2.25, 2.0],
        "random_state": {"seed": 7, "numpy": [1, 2, 3]},
        "metadata": {"best_loss": 1.25, "tokens_seen": 96},
        "optimizer_scalars": {"step": STEPS, "learning_rate": 2e-4},
        "config": {"model": {"lora_rank": RANK}},
    }


def _write_older(
    path: Path, kind: str, fields: Any, weights: Mapping[str, Any], moments: Mapping[str, Any]
) -> None:
    """Under the names of mlx-lm."""
    weights = {_as_in_mlx(name): array.T for name, array in weights.items()}
    moments = {f"{name[:2]}{_as_in_mlx(name[2:])}": array.T for name, array in moments.items()}
    if kind == "directory":
        corruptions.clear(path)
        older.write_folder(path, fields, weights, moments)
        return
    spelled: dict[str, Any] = {"exp_avg": {}, "exp_avg_sq": {}}
    for name, array in moments.items():
        numbers = {"shape": [*array.shape], "data": array.astype(float).ravel().tolist()}
        spelled["exp_avg" if name[0] == "m" else "exp_avg_sq"][name[2:]] = numbers
    texts = {"_metadata": json.dumps(fields).encode(), "_optimizer": json.dumps(spelled).encode()}
    rows = {
        name: (_DTYPES[str(array.dtype)], [*array.shape], array.tobytes()) for name, array in weights.items()
    }
    path.write_bytes(
        corruptions.pack_safetensors(
            {**rows, **{name: ("U8", [len(text)], text) for name, text in texts.items()}}
        )
    )


_DTYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64"}


def _field(patient: Victim) -> None:
    """A field of its JSON is any value, or missing, or another's."""
    file, rng = patient.one_of(_JSON), patient.rng
    tree = json.loads(file.read_text())
    for _ in range(rng.choice((1, 1, 2))):
        families.replace_one(tree, rng, families.any_value)
    file.write_text(json.dumps(tree))
    patient.sign()


def _text(patient: Victim) -> None:
    """JSON that no writer makes, or none."""
    file, rng = patient.one_of(_JSON), patient.rng
    text = file.read_bytes()
    keys = [f'"{key}":'.encode() for key in json.loads(text)]
    file.write_bytes(rng.choice((
        text.replace(b"{", b"{" + rng.choice(keys) + rng.choice(families.JSON_SNIPPETS) + b",", 1),
        text.replace(b"{", b"{" + rng.choice(keys) + b'{"a":' * 100_000, 1),
        b'{"a":' * 100_000, b"[" * 100_000, b"[" + text + b"]", _LARGE_TEXT + text,
        text.replace(b"{", b'{"a":"' + b"\\u0000" * 100_000 + b'",', 1), b"", b"\0" * len(text),
        text.decode().encode("utf-16"), b"\xef\xbb\xbf" + text,
    )))  # fmt: skip
    patient.sign()


def _header(patient: Victim) -> None:
    """A header of tensors that says something else, or is not as long as it says."""
    file, rng = patient.one_of(_TENSORS), patient.rng
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8:end])
    families.replace_one(fields, rng, lambda rng: rng.choice((families.any_value(rng), *families.DTYPES)))
    text = json.dumps(fields).encode()
    length = rng.choice(
        (len(text),) * 6 + (0, len(text) - 1, len(text) + 1, len(raw), 1 << 40, (1 << 64) - 1)
    )
    file.write_bytes(length.to_bytes(8, "little") + text + raw[end:])


def _tensors(patient: Victim) -> None:
    """Whole tensors of another name, shape, dtype or value."""
    file, rng = patient.one_of(_TENSORS), patient.rng
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    fields = {name: field for name, field in json.loads(raw[8:end]).items() if name != "__metadata__"}
    arrays = {
        name: np.frombuffer(raw[end:][slice(*field["data_offsets"])], np.float32).reshape(field["shape"])
        for name, field in fields.items()
    }
    _harm_arrays(arrays, rng)
    rows = {
        name: (_DTYPES[str(array.dtype)], [*array.shape], array.tobytes()) for name, array in arrays.items()
    }
    file.write_bytes(corruptions.pack_safetensors(rows))


def _harm_arrays(arrays: dict[str, Any], rng: Random) -> None:
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(sorted(arrays))
        array = arrays[name]
        action = rng.randrange(5)
        if action == 0:
            del arrays[name]
        elif action == 1:
            arrays[rng.choice((*arrays, *families.HOSTILE_TEXTS[:40], f"{name}.x", name[1:]))] = array
        elif action == 2:
            changed = array.copy()
            changed.flat[rng.randrange(max(1, array.size)) :] = rng.choice(_NUMBERS)
            arrays[name] = changed
        elif action == 3:
            with np.errstate(all="ignore"):
                arrays[name] = array.astype(rng.choice((np.float16, np.float64, np.int64)))
        else:
            shapes = (
                array.T,
                array.ravel(),
                array[:0],
                array[..., :1],
                array[:, None],
                array.sum(),
                array[:-1],
            )
            arrays[name] = np.ascontiguousarray(rng.choice(shapes)).astype(np.float32)


def _older_arrays(patient: Victim) -> None:
    """Weights, or moments, of an older format that do not fit."""
    if patient.kind not in ("directory", "byte tensors"):
        raise LookupError("no older format")
    weights, moments = dict(patient.good.weights), dict(patient.good.moments)
    _harm_arrays(patient.rng.choice((weights, moments, moments)), patient.rng)
    _write_older(patient.path, patient.kind, patient.good.fields, weights, moments)


def _older_fields(patient: Victim) -> None:
    """What an older format says of its optimizer and its run, anything."""
    if patient.kind not in ("directory", "byte tensors"):
        raise LookupError("no older format")
    rng, fields = patient.rng, copy.deepcopy(patient.good.fields)
    for _ in range(rng.choice((1, 1, 2))):
        inner = rng.choice(([fields], [fields["optimizer_scalars"]] * 3, [fields["metadata"]]))[0]
        inner[rng.choice([*inner, "step"])] = families.any_value(rng)
    _write_older(patient.path, patient.kind, fields, patient.good.weights, patient.good.moments)


def _base_model(patient: Victim) -> None:
    """The name of its base model leads somewhere else."""
    file, rng = patient.path / "adapter_config.json", patient.rng
    described = json.loads(file.read_text())
    other = patient.path.parent / "base"
    shutil.copytree(patient.good.base, other)
    config = other / "config.json"
    kind = rng.randrange(4)
    if kind == 0:
        corruptions.replace_by_non_file(config, rng)
    elif kind == 1:
        _field(patient._replace(path=other, kind="base"))
    elif kind == 2:
        corruptions.splice(config, rng)
    names = (
        [str(other)] * 8 if kind < 3 else [str(config), str(patient.path), "/dev/zero", "/", ".", "/dev/fd"]
    )
    described["base_model_name_or_path"] = rng.choice((*names, *families.HOSTILE_TEXTS[:8]))
    file.write_text(json.dumps(described))


def _whole_config(patient: Victim) -> None:
    """The model's own config says something else of its shape."""
    file, rng = patient.path / "config.json", patient.rng
    described = json.loads(file.read_text())
    for _ in range(rng.choice((1, 1, 2))):
        described[rng.choice(sorted(described))] = families.any_value(rng)
    file.write_text(json.dumps(described))


def _state(patient: Victim) -> None:
    """A place in the optimizer's state holds something else."""
    import torch

    file, rng = patient.path / _OPTIMIZER, patient.rng
    state = torch.load(file, weights_only=True)
    for _ in range(rng.choice((1, 1, 2))):
        parent, key = rng.choice(families.locations(state))
        action = rng.randrange(5)
        if action == 0:
            del parent[key]
        elif action == 1 and type(parent) is dict:
            parent[rng.choice((*parent, 0, -1, 1 << 70, "step", "state1", None, 1.5))] = parent[key]
        else:
            parent[key] = _any_of_torch(parent[key], rng)
    torch.save(state, file)


def _any_of_torch(value: Any, rng: Random) -> Any:
    """Something else in the place of a value: most often a tensor that is nearly right."""
    import torch

    if type(value) is not torch.Tensor or rng.random() < 0.15:
        return families.any_value(rng)
    kind = rng.randrange(9)
    if kind == 0:
        return torch.full_like(value, rng.choice(_NUMBERS))
    if kind == 1:
        return rng.choice(
            (value.to_sparse() if value.ndim else value, value.to("meta"), value.bool(), value > 0)
        )
    if kind == 2:
        return value.to(
            rng.choice((torch.float64, torch.bfloat16, torch.int64, torch.complex64, torch.uint8))
        )
    if kind == 3:
        return value.flatten()[:1].expand(rng.choice((1 << 40, 4, 0)))
    if kind == 4:
        return value.flatten()[:1].expand(value.shape) if value.ndim else value.expand(2)
    if kind == 5:
        return rng.choice((torch.nn.Parameter(value.float()), [value], {0: value}, value.tolist()))
    if kind == 6:
        return rng.choice(
            (value.T if value.ndim == 2 else value[None], value.flatten(), value[None], value.sum())
        )
    if kind == 7:
        return value[:0] if value.ndim else value[None][:0]
    return torch.randn(rng.choice(((3,), (2, 2, 2), (1, 1), ())))


class _Calls:
    """A pickle of this one calls a function when it is loaded.

    Args:
        function: by its name.
        arguments: of it.
    """

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def _objects(patient: Victim) -> None:
    """Objects in the place of tensors: code to run, and calls that torch allows with other arguments."""
    import torch

    file, rng = patient.path / _OPTIMIZER, patient.rng
    writes: Any = corruptions.WritesFile(patient.canary)
    rebuild = torch._utils._rebuild_tensor_v2
    storage = torch.zeros(4).untyped_storage()
    make_storage: Any = torch.storage.TypedStorage
    typed = make_storage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    none: Any = collections.OrderedDict()
    evil = rng.choice((
        writes, writes, writes, _Calls(eval, f"open({str(patient.canary)!r}, 'w')"),
        _Calls(os.mkdir, str(patient.canary)),
        _Calls(rebuild, typed, 0, (1 << 40,), (1,), False, none),
        _Calls(rebuild, typed, 1 << 40, (4,), (1,), False, none),
        _Calls(rebuild, typed, -4, (4,), (1,), False, none),
        _Calls(rebuild, typed, 0, (-1,), (1,), False, none),
        _Calls(rebuild, typed, 0, (4,), (-1,), False, none),
        _Calls(rebuild, typed, 0, (2, 2), (1 << 62, 1), False, none),
        _Calls(bytearray, 1 << 40), _Calls(collections.Counter, "a" * 1000), _Calls(torch.device, "meta"),
        _Calls(getattr, "a", "__class__"),
    ))  # fmt: skip
    state = torch.load(file, weights_only=True)
    if rng.random() < 0.3:
        state = rng.choice(({"state": evil, "param_groups": []}, evil, [evil]))
    else:
        parent, key = rng.choice(families.locations(state))
        parent[key] = evil
    torch.save(state, file, _use_new_zipfile_serialization=rng.random() < 0.85)


def _archive(patient: Victim) -> None:
    """The zip around the optimizer's state: packed, doubled, or other than it says."""
    file, rng = patient.path / _OPTIMIZER, patient.rng
    with zipfile.ZipFile(file) as there:
        entries = [(entry.filename, there.read(entry)) for entry in there.infolist()]
    method = zipfile.ZIP_STORED
    kind = rng.randrange(7)
    if kind == 0:
        method = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    elif kind == 1:
        entries.append(rng.choice(entries))
    elif kind == 2:
        entries.pop(rng.randrange(len(entries)))
    elif kind == 3:
        name, content = entries.pop(rng.randrange(len(entries)))
        entries.append(
            (rng.choice((f"../{name}", f"/{name}", name.upper(), "x/data.pkl", "\x1b[2J")), content)
        )
    elif kind == 4:
        at = rng.randrange(len(entries))
        entries[at] = (
            entries[at][0],
            rng.choice((b"", entries[at][1] * 2, b"\x80\x02" + b"(" * 100_000, b"." * 9)),
        )
    elif kind == 5:  # a bomb
        entries.append((entries[0][0].rpartition("/")[0] + "/data/0", bytes(64 << 20)))
        method = zipfile.ZIP_DEFLATED
    raw = bytearray(older.zipped(entries, method))
    if kind == 6:
        records = [found.start() for found in re.finditer(rb"PK(?:\x01\x02|\x03\x04|\x05\x06)", raw)]
        begin = rng.choice(records)
        place = begin + rng.choice((4, 8, 10, 12, 16, 18, 20, 22, 24, 26, 28, 30, 42))
        raw[place : place + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\1\0\0\0", rng.randbytes(4)))
    file.write_bytes(raw)


def _any_file(change: corruptions.Corruption) -> Family:
    def harmed(patient: Victim) -> None:
        change(patient.any_file(), patient.rng)

    return harmed


def _instead(patient: Victim) -> None:
    """A file of another kind's folder in the place of one, or beside it."""
    rng = patient.rng
    others = [
        file for path in patient.good.kinds.values() if path.is_dir() for file in sorted(path.iterdir())
    ]
    file = rng.choice(others)
    name = file.name if rng.random() < 0.6 else patient.any_file().name
    shutil.copyfile(file, patient.path / name)


FAMILIES: dict[str, Family] = {
    "elsewhere: fields": _field,
    "elsewhere: text of JSON": _text,
    "elsewhere: headers of tensors": _header,
    "elsewhere: tensors": _tensors,
    "elsewhere: base models": _base_model,
    "elsewhere: configs of models": _whole_config,
    "elsewhere: states of an optimizer": _state,
    "elsewhere: objects": _objects,
    "elsewhere: archives": _archive,
    "elsewhere: bits": _any_file(corruptions.flip_bits),
    "elsewhere: cut": _any_file(corruptions.cut),
    "elsewhere: spliced": _any_file(corruptions.splice),
    "elsewhere: missing files": _any_file(corruptions.remove),
    "elsewhere: no files": _any_file(corruptions.replace_by_non_file),
    "elsewhere: another's files": _instead,
    "elsewhere: arrays of older formats": _older_arrays,
    "elsewhere: fields of older formats": _older_fields,
}
