"""Hostile folders of other programs: of the transformers Trainer, and adapters of peft and of mlx-lm.

Each family changes a valid folder of some kind. The older formats are among the kinds, with weights that fit
the model. Each is converted (``converting``), and a run resumes from the result (``training``).
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
from collections.abc import Callable
from functools import partial, reduce
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from campaigns.fuzz import corruptions, families, older
from campaigns.fuzz.corruptions import Calls
from campaigns.fuzz.older import Arrays
from distrust.bundled import MODEL

#: Steps of each fixture that has an optimizer.
STEPS = 3
RANK = 2
_STATE, _OPTIMIZER = "trainer_state.json", "optimizer.pt"
_JSON = (_STATE, "adapter_config.json", "config.json", "metadata.json")
_TENSORS = ("adapter_model.safetensors", "adapters.safetensors", "model.safetensors")
_OLDER = ("directory", *older.FORMS)
#: More than the largest JSON that is read.
_LARGE_TEXT = b" " * (5 << 20)
#: A pickle that makes 64 GiB.
_LARGE_BYTES = b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R."
#: Entries of a config that say how much is built, in models of all kinds.
_SIZES = (
    *("decoder_layers", "n_layer", "num_layers", "num_experts", "num_labels", "vocab_size", "hidden_size"),
    *("intermediate_size", "head_dim", "max_position_embeddings"),
)
_NUMBERS = (0.0, -1.0, 1e-45, 3e38, float("inf"), float("nan"))


class Fixtures(NamedTuple):
    """Valid folders and files."""

    base: Path  # folder of the model that all of them were trained on
    kinds: dict[str, Path]  # where each kind is
    fields: dict[str, Any]  # the metadata of the older formats
    weights: dict[str, Any]  # of the adapter, by peft's names
    moments: dict[str, Any]  # by "m." or "v." and peft's name


class Victim(NamedTuple):
    """A copy of a fixture, to be changed."""

    path: Path  # of the copy; its folder has room for more
    kind: str
    valid: Fixtures
    rng: Random  # every random choice

    @property
    def canary(self) -> Path:
        """A file that no reader may write."""
        return self.path.parent / "unpickled"

    def one_of(self, names: tuple[str, ...]) -> Path:
        return self.rng.choice([file for name in names if (file := self.path / name).exists()])

    def any_file(self) -> Path:
        return self.rng.choice(sorted(self.path.iterdir())) if self.path.is_dir() else self.path

    def write_json(self, file: Path, raw: bytes) -> None:
        """Replace a file, and correct its checksum if it has one."""
        file.write_bytes(raw)
        if self.kind == "directory":
            older.sign(self.path)


Family = Callable[[Victim], None]


def base_of(directory: Path) -> Path:
    """Where :func:`make` puts the model."""
    return directory / "base"


def make(directory: Path) -> Fixtures:
    """Make a model of one narrow layer in an empty directory, and one checkpoint of each kind of it."""
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
        full, trainer, adapter = (directory / name / "checkpoint-3" for name in ("full", "trainer", "peft"))
        shutil.copytree(base, full)
        _train(model, full)
        model.save_pretrained(full)
        # The adapter is trained on the saved base model, not on the trained one.
        lora = LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
        trainer.mkdir(parents=True)
        moments = _train(adapted, trainer)
        adapted.save_pretrained(trainer)
    adapted.save_pretrained(adapter)
    names = {n: n.replace(".default", "") for n, p in adapted.named_parameters() if p.requires_grad}
    weights = {names[n]: p.detach().numpy().copy() for n, p in adapted.named_parameters() if n in names}
    moments = {f"{name[:2]}{names[name[2:]]}": array for name, array in moments.items()}
    fields = {**older.FIELDS, "step": STEPS, "optimizer_scalars": {"step": STEPS, "learning_rate": 2e-4}}
    kinds = {"trainer": trainer, "full": full, "peft": adapter}
    if find_spec("mlx_lm") is not None:
        path = kinds["mlx-lm"] = directory / "mlx-lm" / "adapter"
        path.mkdir(parents=True)
        (path / "adapters.safetensors").write_bytes(_pack(_mlx_names(weights)))
        lora = {"rank": RANK, "scale": 4.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
        mlx_config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": lora}
        (path / "adapter_config.json").write_text(json.dumps(mlx_config))
    for kind in _OLDER:
        path = kinds[kind] = directory / kind / f"checkpoint-3{'' if kind == 'directory' else '.safetensors'}"
        path.parent.mkdir()
        _write_older(path, kind, fields, weights, moments)
    return Fixtures(base, kinds, fields, weights, moments)


def _train(model: Any, folder: Path) -> dict[str, Any]:
    """Make some steps of AdamW on noise, saved as the Trainer does; returns the moments by name."""
    import torch

    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    matrices = [value for value in trained.values() if value.ndim >= 2]
    vectors = [value for value in trained.values() if value.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
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
        f"{letter}.{name}": optimizer.state[value][moment].numpy().copy()
        for name, value in trained.items()
        for letter, moment in (("m", "exp_avg"), ("v", "exp_avg_sq"))
    }


def _pack(arrays: Arrays) -> bytes:
    return corruptions.pack_safetensors({name: older.row(array) for name, array in arrays.items()})


def _mlx_names(arrays: Arrays) -> dict[str, Any]:
    """The arrays of an adapter of peft, or their moments, in the layout and under the names of mlx-lm."""
    suffixes = (("base_model.model.", ""), ("lora_A.weight", "lora_a"), ("lora_B.weight", "lora_b"))
    return {reduce(lambda name, pair: name.replace(*pair), suffixes, name): a.T for name, a in arrays.items()}


def _write_older(path: Path, kind: str, fields: Any, weights: Arrays, moments: Arrays) -> None:
    weights, moments = _mlx_names(weights), _mlx_names(moments)
    if kind == "directory":
        corruptions.clear(path)
        older.write_folder(path, fields, weights, moments)
    else:
        path.write_bytes(older.tensor_file(kind, fields, weights, moments))


def _field(victim: Victim) -> None:
    """Replace, remove or copy a field of its JSON."""
    file, rng = victim.one_of(_JSON), victim.rng
    tree = json.loads(file.read_text())
    for _ in range(rng.choice((1, 1, 2))):
        families.replace_one(tree, rng, families.any_value)
    victim.write_json(file, json.dumps(tree).encode())


def _text(victim: Victim) -> None:
    """JSON that no writer produces, or no JSON."""
    file, rng = victim.one_of(_JSON), victim.rng
    text = file.read_bytes()
    keys = [f'"{key}":'.encode() for key in json.loads(text)]
    victim.write_json(file, rng.choice((
        text.replace(b"{", b"{" + rng.choice(keys) + rng.choice(families.JSON_SNIPPETS) + b",", 1),
        text.replace(b"{", b"{" + rng.choice(keys) + b'{"a":' * 100_000, 1),
        b'{"a":' * 100_000, b"[" * 100_000, b"[" + text + b"]", _LARGE_TEXT + text,
        text.replace(b"{", b'{"a":"' + b"\\u0000" * 100_000 + b'",', 1), b"", b"\0" * len(text),
        text.decode().encode("utf-16"), b"\xef\xbb\xbf" + text,
    )))  # fmt: skip


def _header(victim: Victim) -> None:
    """A safetensors header with a changed field or a wrong length."""
    file, rng = victim.one_of(_TENSORS), victim.rng
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8:end])
    families.replace_one(fields, rng, lambda _: rng.choice((families.any_value(rng), *families.DTYPES)))
    text = json.dumps(fields).encode()
    wrong = (0, len(text) - 1, len(text) + 1, len(raw), 1 << 40, (1 << 64) - 1)
    length = rng.choice((*(len(text),) * 6, *wrong))
    file.write_bytes(length.to_bytes(8, "little") + text + raw[end:])


def _tensors(victim: Victim) -> None:
    """Tensors with another name, shape, dtype or value."""
    file = victim.one_of(_TENSORS)
    arrays = load_file(file)
    _change_arrays(arrays, victim.rng)
    file.write_bytes(_pack(arrays))


def _change_arrays(arrays: dict[str, Any], rng: Random) -> None:
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
            views = array.T, array.ravel(), array[:0], array[..., :1], array[:, None], array.sum(), array[1:]
            arrays[name] = np.ascontiguousarray(rng.choice(views)).astype(np.float32)


def _older_format(victim: Victim) -> None:
    """Weights, moments or metadata of an older format that do not match."""
    if victim.kind not in _OLDER:
        raise LookupError("not an older format: there is nothing to change")
    rng, valid = victim.rng, victim.valid
    fields, weights, moments = copy.deepcopy(valid.fields), dict(valid.weights), dict(valid.moments)
    if rng.random() < 0.5:
        _change_arrays(rng.choice((weights, moments, moments)), rng)
    for _ in range(rng.choice((0, 1, 2))):
        scalars = fields["optimizer_scalars"]
        section = rng.choice((fields, scalars, scalars, scalars, fields["metadata"]))
        section[rng.choice([*section, "step"])] = families.any_value(rng)
        if type(fields["optimizer_scalars"]) is not dict or type(fields["metadata"]) is not dict:
            break
    _write_older(victim.path, victim.kind, fields, weights, moments)


def _base_model(victim: Victim) -> None:
    """Another, damaged or missing base model."""
    file, rng = victim.path / "adapter_config.json", victim.rng
    config = json.loads(file.read_text())
    base = Path(shutil.copytree(victim.valid.base, victim.path.parent / "base"))
    base_config = base / "config.json"
    kind = rng.randrange(6)
    if kind == 0:
        corruptions.replace_by_non_file(base_config, rng)
    elif kind == 1:
        _field(victim._replace(path=base, kind="base"))
    elif kind == 2:
        corruptions.splice(base_config, rng)
    elif kind == 3:
        claims = json.loads(base_config.read_text())
        section: dict[str, Any] = rng.choice((claims, claims.setdefault("text_config", {})))
        section[rng.choice((*_SIZES, *claims))] = rng.choice(
            (1 << 16, 1 << 17, 1 << 24, 10**6, 1 << 31, 1 << 70)
        )
        base_config.write_text(json.dumps(claims))
    elif kind == 4:
        shutil.copy(file, base)  # an adapter, which transformers would apply
    paths = [str(base_config), str(victim.path), "/dev/zero", "/", ".", "/dev/fd"]
    names = [str(base)] * 8 if kind < 5 else paths
    config["base_model_name_or_path"] = rng.choice((*names, *families.HOSTILE_TEXTS[:8]))
    file.write_text(json.dumps(config))


def _state(victim: Victim) -> None:
    """Replace, remove or copy a value of the optimizer's state."""
    import torch

    file, rng = victim.path / _OPTIMIZER, victim.rng
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
    """A replacement for a value: usually a tensor that is nearly right."""
    import torch

    if type(value) is not torch.Tensor or rng.random() < 0.15:
        return families.any_value(rng)
    first = value.flatten()[:1]
    dtypes = (torch.float64, torch.bfloat16, torch.int64, torch.complex64, torch.uint8, torch.bool)
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: torch.full_like(value, rng.choice(_NUMBERS)),
        lambda: rng.choice((value.to_sparse() if value.ndim else value, value.to("meta"))),
        lambda: value.to(rng.choice(dtypes)),
        lambda: first.expand(rng.choice((1 << 40, 4, 0))),  # claims more than there is
        lambda: first.expand(value.shape) if value.ndim else value.expand(2),
        lambda: rng.choice((torch.nn.Parameter(value.float()), [value], {0: value}, value.tolist())),
        lambda: rng.choice((value.T if value.ndim == 2 else value[None], value.flatten(), value.sum())),
        lambda: value[:0] if value.ndim else value[None][:0],
        lambda: torch.randn(rng.choice(((3,), (2, 2, 2), (1, 1), ()))),
    )
    return rng.choice(kinds)()


def _objects(victim: Victim) -> None:
    """Objects instead of tensors: code to run, and functions that torch allows, with hostile arguments."""
    import torch

    file, rng = victim.path / _OPTIMIZER, victim.rng
    writes: Any = Calls(Path.touch, victim.canary)
    rebuild = torch._utils._rebuild_tensor_v2
    make_storage: Any = torch.storage.TypedStorage
    storage = torch.zeros(4).untyped_storage()
    typed = make_storage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    layouts = (  # offset, shape and strides of a tensor that does not fit its storage
        (0, (1 << 40,), (1,)), (1 << 40, (4,), (1,)), (-4, (4,), (1,)), (0, (-1,), (1,)), (0, (4,), (-1,)),
        (0, (2, 2), (1 << 62, 1)),
    )  # fmt: skip
    evil = rng.choice((
        writes, writes, writes, Calls(eval, f"open({str(victim.canary)!r}, 'w')"),
        Calls(os.mkdir, str(victim.canary)), Calls(bytearray, 1 << 40), Calls(getattr, "a", "__class__"),
        Calls(collections.Counter, "a" * 1000), Calls(torch.device, "meta"),
        *(Calls(rebuild, typed, *layout, False, collections.OrderedDict()) for layout in layouts),
    ))  # fmt: skip
    state = torch.load(file, weights_only=True)
    if rng.random() < 0.3:
        state = rng.choice(({"state": evil, "param_groups": []}, evil, [evil]))
    else:
        parent, key = rng.choice(families.locations(state))
        parent[key] = evil
    torch.save(state, file, _use_new_zipfile_serialization=rng.random() < 0.85)


def _archive(victim: Victim) -> None:
    """The zip around the optimizer's state: compressed, with repeated entries, or inconsistent."""
    file, rng = victim.path / _OPTIMIZER, victim.rng
    with zipfile.ZipFile(file) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    method = zipfile.ZIP_STORED
    kind, at = rng.randrange(8), rng.randrange(len(entries))
    name, content = entries[at]
    if kind == 0:
        method = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    elif kind == 1:
        entries.append(entries[at])
    elif kind == 2:
        entries.pop(at)
    elif kind == 3:
        entries[at] = (rng.choice((f"../{name}", f"/{name}", name.upper(), "x/data.pkl", "\x1b[2J")), content)
    elif kind == 4:
        entries[at] = name, rng.choice((b"", content * 2, b"\x80\x02" + b"(" * 100_000, b"." * 9))
    elif kind == 5:  # a bomb
        entries.append((f"{name.rpartition('/')[0]}/data/0", bytes(64 << 20)))
        method = zipfile.ZIP_DEFLATED
    elif kind == 7:  # torch would find it under the usual name
        entries.insert(0, (f"{name.rpartition('/')[0]}/{rng.choice(('Data.pkl', 'DATA.PKL'))}", _LARGE_BYTES))
    raw = bytearray(older.pack_zip(entries, method))
    if kind == 6:
        records = [match.start() for match in re.finditer(rb"PK(?:\x01\x02|\x03\x04|\x05\x06)", raw)]
        offset = rng.choice(records) + rng.choice((4, 8, 10, 12, 16, 18, 20, 22, 24, 26, 28, 30, 42))
        raw[offset : offset + 4] = rng.choice((b"\xff" * 4, bytes(4), b"\1\0\0\0", rng.randbytes(4)))
    file.write_bytes(raw)


def _corrupt(change: corruptions.Corruption, victim: Victim) -> None:
    change(victim.any_file(), victim.rng)


def _instead(victim: Victim) -> None:
    """A file of another kind's folder, instead of one of its files or in addition."""
    rng = victim.rng
    folders = [path for path in victim.valid.kinds.values() if path.is_dir()]
    file = rng.choice([file for path in folders for file in sorted(path.iterdir())])
    name = file.name if rng.random() < 0.6 else victim.any_file().name
    shutil.copyfile(file, victim.path / name)


FAMILIES: dict[str, Family] = {
    "imports: fields": _field,
    "imports: text of JSON": _text,
    "imports: headers of tensors": _header,
    "imports: tensors": _tensors,
    "imports: base models": _base_model,
    "imports: states of an optimizer": _state,
    "imports: objects": _objects,
    "imports: archives": _archive,
    **{f"imports: {name}": partial(_corrupt, change) for name, change in corruptions.BY_NAME.items()},
    "imports: another's files": _instead,
    "imports: older formats": _older_format,
}
