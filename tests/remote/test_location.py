"""Names of objects and folders: what is understood, and that a URL is never taken for a path."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrust import CheckpointManager, ConfigError, TrainConfig, load_file, save_file
from distrust.checkpoint.remote.location import Location, is_url, parse, require_path

_PARTS = st.from_regex(r"[A-Za-z0-9_=+-][A-Za-z0-9 ._=+-]{0,9}", fullmatch=True)
_LOCATIONS = st.builds(
    lambda scheme, bucket, parts: Location(scheme, bucket, "/".join(parts)),
    st.sampled_from(["s3", "gs", "az"]),
    st.from_regex(r"[a-z0-9][a-z0-9.-]{2,20}", fullmatch=True),
    st.lists(_PARTS, max_size=4),
)


@given(_LOCATIONS, _PARTS)
def test_a_location_is_read_as_it_is_written(location, name):
    assert parse(str(location), "--out") == location
    assert parse(f"{location}/", "--out") == location
    assert (location / name).parent == location
    assert (location / name).name == name
    assert is_url(str(location))


@pytest.mark.parametrize("url", ["s3a://bucket/x", "S3://bucket/x", "s3://bucket//x/"])
def test_other_ways_to_write_the_same(url):
    assert parse(url, "--out") == Location("s3", "bucket", "x")


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("s3:/bucket/run", "give s3://BUCKET/NAME"),  # what Path makes of s3://
        ("s3://", "give s3://BUCKET/NAME"),
        ("az:///x", "give az://CONTAINER/NAME"),
        ("https://bucket.s3.amazonaws.com/x", "begins with s3://, gs://, az://"),
        ("s3://key:secret@bucket/x", "come from the environment"),
        ("s3://bucket/x?versionId=1", "plain name"),
        ("s3://bucket/../x", "plain name"),
        ("s3://bucket/a\nb", "plain name"),
        (r"s3://bucket/a\b", "plain name"),
        ("s3://b_/x", "check its name"),
    ],
)
def test_what_is_no_location_is_refused_in_one_line(url, advice):
    with pytest.raises(ConfigError) as error:
        parse(url, "--mirror")
    assert advice in str(error.value)
    assert str(error.value).startswith("--mirror ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["runs/first", "./s3", "C:/x", "a:b", "/s3:/x"])
def test_a_path_is_a_path(name):
    assert not is_url(name)
    assert require_path(name, "--to") == require_path(os.fspath(name), "--to")
    assert parse(name, "--mirror") == Location("file", "", os.path.abspath(name))


def test_no_folder_is_made_of_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: CheckpointManager("s3://bucket/run"),
        lambda: save_file("s3://bucket/x.safetensors", None),
        lambda: load_file("s3://bucket/x.safetensors"),
        lambda: TrainConfig(model="s3://bucket/model"),
        lambda: TrainConfig(out="http://bucket/run"),
        lambda: TrainConfig(cache_dir="s3://bucket/cache"),
        lambda: TrainConfig(out="s3://bucket/run", mirror="s3://bucket/run"),
    ):
        with pytest.raises(ConfigError, match=r"s3://|http://|URL"):
            call()
    assert not list(tmp_path.iterdir())


def test_two_buckets_have_two_local_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTRUST_CACHE", str(tmp_path))
    folders = {
        TrainConfig(out=f"{each}/runs/first").run_directory for each in ("s3://one", "gs://one", "s3://two")
    }
    assert len(folders) == 3
    assert {folder.parent for folder in folders} == {tmp_path / "runs"}
