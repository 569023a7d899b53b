"""The client of a store: its six calls, one line for each failure, and that nobody is asked unasked."""

from __future__ import annotations

import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("obstore", reason="needs the extra [remote]")

from distrust import ConfigError, RemoteError
from distrust.checkpoint.remote import credentials
from distrust.checkpoint.remote.client import PART_BYTES, connect
from distrust.checkpoint.remote.location import parse


@pytest.fixture
def answering(monkeypatch):
    """An S3 server that gives every request the same answer; its requests are in ``paths``."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            server.paths.append(self.path)
            status, code = server.answer
            body = f"<Error><Code>{code}</Code></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_DELETE = answer  # noqa: N815

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.paths, server.answer = [], (500, "InternalError")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "code", "message", "temporary"),
    [
        (404, "NoSuchBucket", "the bucket does not exist", False),
        (403, "SignatureDoesNotMatch", "the secret key is wrong", False),
        (403, "AccessDenied", "these credentials may not list it", False),
        (400, "ExpiredToken", "have expired", True),
        (403, "RequestTimeTooSkewed", "clock", True),
        (400, "AuthorizationHeaderMalformed", "AWS_REGION", False),
        (400, "SomethingNew", "the store failed (400 SomethingNew)", False),
    ],
)
def test_an_answer_is_explained_in_one_line(answering, status, code, message, temporary):
    answering.answer = status, code
    with pytest.raises(RemoteError) as error:
        connect(parse("s3://bucket/run", "--mirror"), give_up_after=0).list()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("s3://bucket/run: cannot list it: ")
    assert error.value.temporary == temporary


def test_a_folder_is_a_store(tmp_path):
    client = connect(parse(tmp_path / "mirror", "--mirror"))
    assert client.create("terms/1", b"first")
    assert not client.create("terms/1", b"second")
    large = io.BytesIO(bytes(range(256)) * (PART_BYTES // 128))
    large.seek(7)  # an upload begins at the start of the file, also when it is repeated
    client.put("large", large)
    client.put("small", b"abc")
    assert bytes(client.read("terms/1", 0, 100)) == b"first"
    assert bytes(client.read("large", 254, 258)) == bytes([254, 255, 0, 1])
    assert client.read("none", 0, 1) is None
    assert client.head("none") is None
    assert client.head("small").size == 3
    assert {each.key: each.size for each in client.list()} == {
        "large": 2 * PART_BYTES,
        "small": 3,
        "terms/1": 5,
    }
    assert [each.key for each in client.list("terms/")] == ["terms/1"]
    client.delete("small")
    client.delete("none")
    assert client.head("small") is None


@pytest.mark.parametrize("name", ["a file/run", "a file"])
def test_a_folder_that_cannot_be_created_is_one_line(tmp_path, name):
    (tmp_path / "a file").touch()
    with pytest.raises(RemoteError, match=f"{name}: cannot write it: (Not a directory|File exists)$"):
        connect(parse(tmp_path / name, "--mirror"))


def test_without_credentials_no_metadata_address_is_asked(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", credentials.INSTANCE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for url in ("s3://bucket/run", "gs://bucket/run", "az://container/run"):
        with pytest.raises(RemoteError, match="no credentials were found in the environment"):
            connect(parse(url, "--mirror"))


@pytest.mark.parametrize(
    ("url", "variable", "value", "message"),
    [
        ("s3://bucket", "AWS_ENDPOINT_URL", "", "AWS_ENDPOINT_URL is '': give http://HOST:PORT"),
        ("s3://bucket", "AWS_ENDPOINT_URL", "h:9", "AWS_ENDPOINT_URL is 'h:9': give http://HOST:PORT"),
        (
            "az://container",
            "AZURE_STORAGE_ACCOUNT_KEY",
            "a",
            "az://container: wrong credentials: Account",
        ),
    ],
)
def test_what_the_client_cannot_use_is_one_line(monkeypatch, url, variable, value, message):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises((ConfigError, RemoteError)) as error:
        connect(parse(url, "--mirror"))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_profile_without_keys_asks_no_metadata_address(monkeypatch, tmp_path):
    pytest.importorskip("boto3")
    from botocore.utils import IMDSFetcher

    def refuse(*_: object) -> None:
        raise AssertionError("it asks a metadata address")

    monkeypatch.setattr(IMDSFetcher, "_fetch_metadata_token", refuse)
    (tmp_path / "config").write_text("[default]\nregion = eu-west-1\n")
    with pytest.raises(RemoteError, match="no credentials"):
        credentials.options("s3", "s3://bucket", {"AWS_CONFIG_FILE": str(tmp_path / "config")})


def test_credentials_of_a_profile(tmp_path):
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id = a\naws_secret_access_key = b\n")
    (tmp_path / "config").write_text(
        "[profile work]\nregion = eu-west-1\nendpoint_url = http://h\n[default]\n"
    )
    environ = {
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_PROFILE": "work",
    }
    arguments = {
        "aws_access_key_id": "a",
        "aws_secret_access_key": "b",
        "region": "eu-west-1",
        "endpoint_url": "http://h",
    }
    assert credentials.options("s3", "s3://bucket", environ) == arguments
    environ |= {"AWS_REGION": "us-west-2", "AWS_ENDPOINT_URL": "http://i"}
    assert credentials.options("s3", "s3://bucket", environ)["region"] == "us-west-2"
    with pytest.raises(RemoteError, match="no credentials"):
        credentials.options("s3", "s3://bucket", environ | {"AWS_PROFILE": "other"})
    # As for the AWS tools: no mixture of a profile's keys and of those in the environment.
    options = credentials.options("s3", "s3://bucket", environ | {"AWS_ACCESS_KEY_ID": "c"})
    assert options == {"region": "us-west-2"}
    options = credentials.options("s3", "s3://bucket", {"AWS_ACCESS_KEY_ID": "a", "AWS_CONFIG_FILE": "/none"})
    assert options == {"region": "us-east-1"}
    assert credentials.options("az", "az://c", {credentials.INSTANCE: "1"}) == {}
