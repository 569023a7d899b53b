"""The client of an object store: obstore behind six calls. The only module that talks to a store.

It retries what may succeed later until a deadline, and raises RemoteError with one line. Tests put a failing
store in its place, as :class:`~distrust.checkpoint.disk.Disk` does for a failing disk.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from distrust.checkpoint.remote import credentials
from distrust.checkpoint.remote.location import STORES, Location
from distrust.errors import MissingDependency, RemoteError, shorten

#: Of an upload in several parts; with this many parts at once it needs 32 MiB of memory.
PART_BYTES = 8 << 20
PARTS_IN_FLIGHT = 4
#: Seconds for which a call is repeated.
GIVE_UP_AFTER = 30.0
#: Seconds of one request, such as a part.
REQUEST_SECONDS = 120.0


Answer = TypeVar("Answer")


class ObjectInfo(NamedTuple):
    """What a listing says of an object."""

    key: str  #: below the location of the client
    size: int  #: in bytes
    etag: str  #: changes with every write


class Client:
    """The calls that this package makes to a store; keys are below the client's location.

    All raise RemoteError. A written object appears complete, or not at all.
    """

    def __init__(self, location: Location, store: Any, give_up_after: float) -> None:
        import obstore

        self.location = location
        self._give_up_after = give_up_after
        self._obstore: Any = obstore
        self._store = store
        self._process = os.getpid()
        self._prefix = f"{location.key}/" if location.key and location.scheme != "file" else ""

    def create(self, key: str, content: bytes) -> bool:
        """Write an object that does not exist. Returns False if it does, also if an earlier try wrote it."""
        put = partial(self._obstore.put, file=content, mode="create")
        return self._request("write", key, put, self._obstore.exceptions.AlreadyExistsError) is not None

    def put(self, key: str, content: bytes | BinaryIO) -> None:
        """Write an object, from memory or from an open file, in parts if it is large."""

        def put(store: Any, path: str) -> None:
            if not isinstance(content, bytes):
                content.seek(0)
            self._obstore.put(store, path, content, chunk_size=PART_BYTES, max_concurrency=PARTS_IN_FLIGHT)

        self._request("write", key, put)

    def read(self, key: str, begin: int, end: int) -> memoryview | None:
        """Bytes ``begin`` to ``end`` of an object; fewer if it is shorter, None if there is none."""

        def read(store: Any, path: str) -> memoryview:
            try:
                return memoryview(self._obstore.get_range(store, path, start=begin, end=end))
            except self._obstore.exceptions.BaseError as error:
                if _PAST_END.search(str(error)):
                    return memoryview(b"")
                raise

        return self._request("read", key, read, FileNotFoundError)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """All objects whose keys begin with ``prefix``, which is empty or ends with a slash."""

        def read(store: Any, path: str) -> list[ObjectInfo]:
            pages = self._obstore.list(store, path, chunk_size=1000)
            return [self._info(each) for page in pages for each in page]

        return self._request("list", prefix, read) or []

    def head(self, key: str) -> ObjectInfo | None:
        """What a listing says of one object; None if there is none."""
        described = self._request("read", key, self._obstore.head, FileNotFoundError)
        return described and self._info(described)

    def delete(self, key: str) -> None:
        """Remove an object, if it exists."""
        self._request("delete", key, self._obstore.delete, FileNotFoundError)

    def _request(
        self,
        action: str,
        key: str,
        call: Callable[[Any, str], Answer],
        expected: type[Exception] | None = None,
    ) -> Answer | None:
        """The answer to a call; None for an expected error. A call that may succeed later is repeated."""
        url = self.location / key if key else self.location
        if os.getpid() != self._process:  # its threads do not exist here: it would hang
            raise RemoteError(f"{url}: opened before a fork; open it again", url=str(url))
        end, pause = time.monotonic() + self._give_up_after, 0.2
        while True:
            try:
                return call(self._store, self._prefix + key)
            except (self._obstore.exceptions.BaseError, OSError) as error:
                if expected is not None and isinstance(error, expected):
                    return None
                explained = explain(error, url, action)
                if not explained.temporary or time.monotonic() + pause > end:
                    raise explained from None
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _info(self, described: Any) -> ObjectInfo:
        key = str(described["path"]).removeprefix(self._prefix)
        return ObjectInfo(key, int(described["size"]), str(described["e_tag"] or ""))


def connect(
    location: Location, *, give_up_after: float = GIVE_UP_AFTER, request_seconds: float = REQUEST_SECONDS
) -> Client:
    """A client of a store, or of a folder, which is created. It makes no request yet.

    Raises MissingDependency, or RemoteError: no usable credentials are found, or no folder can be created.
    """
    try:
        from obstore import exceptions, store
    except ModuleNotFoundError:
        raise MissingDependency(str(location), library="obstore", extra="remote") from None
    if location.scheme == "file":
        try:
            Path(location.key).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explain(error, location, "write") from None
        return Client(location, store.LocalStore(location.key), give_up_after)
    kinds: dict[str, Any] = {"s3": store.S3Store, "gs": store.GCSStore, "az": store.AzureStore}
    options = {
        # An endpoint in the environment may be any server of the user's, also one without encryption.
        "client_options": {"allow_http": True, "timeout": timedelta(seconds=request_seconds)},
        "retry_config": {  # of a part, too; a long pause would delay a beat
            "retry_timeout": timedelta(seconds=give_up_after),
            "backoff": {"max_backoff": timedelta(seconds=5)},
        },
        **credentials.options(location.scheme, str(location)),
    }
    try:
        return Client(location, kinds[location.scheme](location.bucket, **options), give_up_after)
    except exceptions.BaseError as error:  # of the environment: an account that is missing, a malformed key
        reason = shorten(str(error).partition("\n")[0].partition("error: ")[2])
        raise RemoteError(f"{location}: wrong credentials: {reason}", url=str(location)) from None


_PAST_END = re.compile("status code: 416|[Rr]ange was invalid")
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]{1,100})</Code>")
#: What the codes of stores mean to a user.
_REMEDIES = {
    "NoSuchBucket": "the bucket does not exist: create it, or check its name and region",
    "ContainerNotFound": "the container does not exist: create it, or check its name",
    "InvalidAccessKeyId": "the access key is not known there: check the credentials, and the endpoint",
    "SignatureDoesNotMatch": "the secret key is wrong: check the credentials",
    "AuthenticationFailed": "the account key or signature is wrong: check the credentials",
    "ExpiredToken": "the credentials have expired: renew them",
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it",
    "PermanentRedirect": "the bucket is in another region: set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region: set AWS_REGION",
}
#: Codes of errors that pass although their status says otherwise: fresh credentials may arrive.
_PASSING = {"ExpiredToken", "RequestTimeTooSkewed", "SlowDown", "OperationAborted"}


def explain(error: Exception, location: Location, action: str) -> RemoteError:
    """One line for an error of the client, whose own texts have a dozen."""
    text = str(error).partition("\n\nDebug source")[0]
    status, code = _STATUS.search(text), _CODE.search(text)
    number, name = int(status[1]) if status else 0, code[1] if code else ""
    may_pass = not number or number >= 500 or number in (408, 409, 429) or name in _PASSING
    codes = " ".join(filter(None, (str(number or ""), name)))
    if isinstance(error, PermissionError) or location.scheme == "file":
        reason = getattr(error, "strerror", None) or text.partition("\n")[0]
        may_pass, codes = location.scheme == "file", ""
    elif name in _REMEDIES:
        reason = _REMEDIES[name]
    elif number in (401, 403):
        reason = f"these credentials may not {action} it"
    elif number == 404:
        reason = f"no such {STORES[location.scheme]}"
    elif "dns error" in str(error):
        reason = "the host of the store is not known: check the endpoint, and the network"
    elif "object with invalid path" in text:  # an empty or invisible part, such as in a//b
        reason = f"an object there has a name that cannot be read; remove it ({text.partition('path: ')[2]})"
        may_pass = False
    else:
        silent = f"the store does not answer ({text.rpartition(' - ')[2] or text})"
        reason = "the store failed" if number else silent
    line = f"{location}: cannot {action} it: {shorten(reason)}{f' ({codes})' if codes else ''}"
    return RemoteError(line, url=str(location), temporary=may_pass)
