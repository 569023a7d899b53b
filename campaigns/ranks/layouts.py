"""How the ranks of an attempt are started: by their variables alone, or by ``distrust train --nproc``."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from campaigns.ranks.machines import DEVICE, Machine
from campaigns.ranks.processes import Group, Program, Server

RENDEZVOUS_PORT = 29400  # in the network of a machine


@dataclass(frozen=True)
class Layout:
    """So many ranks, on one machine or evenly on two; a :class:`campaigns.session.Launcher`."""

    server: Server
    count: int  # of all ranks
    launched: bool  # by agents, one on each machine
    machines: Sequence[Machine] = ()  # two, or none for the machine that the campaign runs on
    options: tuple[str, ...] = ()  # of the launcher
    fault: str | None = None  # to plant in every process
    fresh: bool = False  # whether new interpreters are started, not forks

    @property
    def name(self) -> str:
        ranks = "1 rank" if self.count == 1 else f"{self.count} ranks"
        machines = " on 2 machines" if self.machines else ""
        return f"{ranks}{machines}, {'launcher' if self.launched else 'no launcher'}"

    def start(self, arguments: Sequence[str], *, out: Path, err: Path) -> Group:
        programs = self._agents(arguments) if self.launched else self._ranks(arguments)
        pids = [self._start(program, out, err) for program in programs]
        return Group(self.server, pids, are_agents=self.launched and self.count > 1)  # --nproc 1 starts none

    def start_agent(self, index: int, arguments: Sequence[str], *, out: Path, err: Path) -> int:
        """Start the agent of one machine alone, as when it returns."""
        return self._start(self._agents(arguments)[index], out, err)

    def _start(self, program: Program, out: Path, err: Path) -> int:
        return self.server.start(program._replace(fault=self.fault, fresh=self.fresh), out=out, err=err)

    def _ranks(self, arguments: Sequence[str]) -> list[Program]:
        if self.count == 1:
            return [Program("distrust", arguments)]
        per_machine = self.count // max(1, len(self.machines))
        address = self.machines[0].address if self.machines else "127.0.0.1"
        shared = {"WORLD_SIZE": str(self.count), "LOCAL_WORLD_SIZE": str(per_machine)}
        shared |= {"MASTER_ADDR": address, "MASTER_PORT": str(self._free_port())}
        programs = []
        for rank in range(self.count):
            variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank % per_machine)}
            machine = self.machines[rank // per_machine] if self.machines else None
            programs.append(self._program(arguments, variables, machine))
        return programs

    def _agents(self, arguments: Sequence[str]) -> list[Program]:
        per_machine = self.count // max(1, len(self.machines))
        arguments = [arguments[0], "--nproc", str(per_machine), *self.options, *arguments[1:]]
        if not self.machines:
            return [Program("distrust", arguments)]
        rendezvous = ["--rendezvous", f"{self.machines[0].address}:{RENDEZVOUS_PORT}"]
        nodes = [] if "--nnodes" in self.options else ["--nnodes", "2"]
        return [self._program([*arguments, *nodes, *rendezvous], {}, machine) for machine in self.machines]

    @staticmethod
    def _program(arguments: Sequence[str], variables: dict[str, str], machine: Machine | None) -> Program:
        if machine is None:
            return Program("distrust", arguments, variables)
        return Program("distrust", arguments, {**variables, "GLOO_SOCKET_IFNAME": DEVICE}, machine.network)

    def _free_port(self) -> int:
        if self.machines:
            return RENDEZVOUS_PORT + 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return int(free.getsockname()[1])
