"""What a process does to files, to the network and to other processes, as Python's audit hooks report it.

Native code (the readers of safetensors and of tokenizers, Arrow) does not report what it opens: a comparison
of folders must show what it writes.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

Kind = Literal["reads", "writes", "contacts", "starts"]

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: Events whose first argument is a path that is written to, or whose first two are.
_CHANGES = {
    "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.truncate": 1, "os.chmod": 1, "os.chown": 1,
    "os.utime": 1, "os.setxattr": 1, "os.removexattr": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2,
}  # fmt: skip
_LISTINGS = ("os.listdir", "os.scandir")
#: The sockets of a machine's own processes are none of these.
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind")
_PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "webbrowser.open")


class Access(NamedTuple):
    kind: Kind
    event: str  # the name of the audit event
    what: str  # a path, absolute unless it is relative to an open folder; or the address or command


class Recorder:
    """Records accesses while :meth:`record` runs. The hook itself stays: Python cannot remove one."""

    def __init__(self) -> None:
        self.accesses: list[Access] = []
        self._is_active = False
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def record(self) -> Iterator[list[Access]]:
        """Collect the accesses of a block, of all threads."""
        self.accesses, self._is_active = [], True
        try:
            yield self.accesses
        finally:
            self._is_active = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_active:
            return
        if event == "open":
            path, mode, flags = arguments
            text = mode if isinstance(mode, str) else ""
            is_write = bool(flags & _WRITE_FLAGS) or any(letter in text for letter in "wax+")
            self._add_path("writes" if is_write else "reads", event, path)
        elif event in _CHANGES:
            for path in arguments[: _CHANGES[event]]:
                self._add_path("writes", event, path)
        elif event in _LISTINGS:
            self._add_path("reads", event, arguments[0])
        elif event in _NETWORK:
            address = arguments if event.startswith("socket.get") else arguments[1]
            if not isinstance(address, (str, bytes)):  # the path of a local socket
                self.accesses.append(Access("contacts", event, repr(address)))
        elif event in _PROCESSES:
            self.accesses.append(Access("starts", event, repr(arguments[:2])))

    def _add_path(self, kind: Kind, event: str, path: Any) -> None:
        if isinstance(path, (str, bytes, Path)):  # not the number of an open file
            self.accesses.append(Access(kind, event, os.path.abspath(os.fsdecode(path))))
