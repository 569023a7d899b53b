"""Two machines: network namespaces that a virtual cable connects, which can be cut without a trace.

A cut cable delivers nothing and says nothing: each side then sends to a hardware address that nobody has.
Needs Linux, ``ip`` and root. A namespace lasts as long as the process in it, so nothing is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple, Self

DEVICE = "cable"
_CLONE_NEWNET = 0x40000000
_PR_SET_PDEATHSIG = 1
_NOBODY = "02:00:00:00:00:99"


class Machine(NamedTuple):
    address: str
    network: int  # a process in its namespace


class Machines:
    """Two machines; a context that removes them."""

    def __init__(self) -> None:
        first, second = _hold_namespace(), _hold_namespace()
        self.both = (Machine("10.77.0.1", first), Machine("10.77.0.2", second))
        _ip(self.both[0], "link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE, "netns", str(second))
        for machine in self.both:
            _ip(machine, "addr", "add", f"{machine.address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _ip(machine, "link", "set", device, "up")
        self._is_cut = False

    def cut(self) -> None:
        """Cut the cable."""
        self._is_cut = True
        for machine, peer in zip(self.both, reversed(self.both), strict=True):
            address = (peer.address, "lladdr", _NOBODY, "nud", "permanent", "dev", DEVICE)
            _ip(machine, "neigh", "replace", *address)

    def mend(self) -> None:
        """Connect the machines again, if the cable is cut."""
        if self._is_cut:
            for machine, peer in zip(self.both, reversed(self.both), strict=True):
                _ip(machine, "neigh", "del", peer.address, "dev", DEVICE)
        self._is_cut = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for machine in self.both:
            os.kill(machine.network, signal.SIGKILL)
            os.waitpid(machine.network, 0)


def join_network(pid: int) -> None:
    """Move this thread into the network of a process; its sockets stay where they were made."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/net") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def obstacle() -> str | None:
    """Why there can be no machines here; None if there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if _find_ip() is None:
        return "ip is not installed"
    try:
        with Machines():
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)


def _hold_namespace() -> int:
    """Start a process that does nothing, in a new network; returns its id."""
    ready, is_made = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            libc = ctypes.CDLL(None, use_errno=True)
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if libc.unshare(_CLONE_NEWNET) == 0:
                os.write(is_made, b".")
                os.close(is_made)
                while True:
                    time.sleep(3600)
        os._exit(1)
    os.close(is_made)
    with os.fdopen(ready, "rb") as file:
        if file.read(1) != b".":
            os.waitpid(pid, 0)
            raise OSError("unshare of the network is refused")
    return pid


def _find_ip() -> str | None:
    return shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _ip(machine: Machine, *arguments: str) -> None:
    command: Sequence[str] = ["nsenter", "-t", str(machine.network), "-n", _find_ip() or "ip", *arguments]
    subprocess.run(command, check=True, capture_output=True)
