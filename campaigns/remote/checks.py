"""What must hold in a store, and between processes that wrote to it one after another or at once.

The rules of terms and bases are written here once more, as simply as they go.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from campaigns.campaign import never, require
from campaigns.remote.program import FINISHED, REFUSED, REPLACED
from campaigns.remote.writers import Writer
from distrust.checkpoint.remote import fetch, line
from distrust.checkpoint.remote.client import Client, connect
from distrust.checkpoint.remote.line import RemoteFile
from distrust.checkpoint.remote.location import parse
from distrust.errors import DistrustError


class Holder(NamedTuple):
    """A term, and the process that has it."""

    term: int
    base: int
    number: int  # of the process; 0 if none of the case's


def open_store(url: str) -> Client:
    """A client of the store itself, past the proxy."""
    return connect(parse(url, "URL"))


def holders(client: Client, numbers: dict[int, int]) -> list[Holder]:
    """The terms by number; ``numbers`` maps the ids of processes to their numbers."""
    found_terms = []
    for info in client.list("terms/"):
        if info.key.endswith(".json"):
            content = client.read(info.key, 0, info.size)
            require(content is not None, f"{client.location}/{info.key} is listed, and is not there")
            assert content is not None
            values = json.loads(bytes(content))
            term = int(info.key.removeprefix("terms/").removesuffix(".json"))
            found_terms.append(Holder(term, values["base"], numbers.get(values["pid"], 0)))
    return sorted(found_terms)


def counting(client: Client, terms: Sequence[Holder]) -> list[RemoteFile]:
    """The checkpoints that count."""
    files = [file for info in client.list() if (file := line.parse_key(info))]
    return sorted(
        (file for file in files if all(file.step <= each.base for each in terms if each.term > file.term)),
        key=lambda file: (file.step, file.kind == "final", file.term),
    )


class Case:
    """What the processes of one run did, and what must be true of it."""

    def __init__(self, url: str, writers: Sequence[Writer], codes: Sequence[int]) -> None:
        self.client = open_store(url)
        self.writers, self.codes = writers, codes
        self.terms = holders(self.client, {writer.pid: writer.plan.number for writer in writers})
        self._term_of = {each.number: each for each in self.terms}

    def require_all(self) -> None:
        self.require_terms()
        self.require_objects()
        self.require_answers()
        for writer in self.writers:
            self.require_resumed(writer)

    def require_terms(self) -> None:
        """Every term has one holder, and each process that holds one states where it goes on from."""
        numbers = [each.number for each in self.terms]
        url = self.client.location
        require(len(set(numbers)) == len(numbers), f"{url}: a process has two terms: {self.terms}")
        require(0 not in numbers, f"{url}: a term of nobody: {self.terms}")
        terms = [each.term for each in self.terms]
        require(terms == list(range(1, len(terms) + 1)), f"{url}: not one term after another: {self.terms}")
        for writer in self.writers:
            if writer.event("took") is not None:
                holder, resumed = self._term_of.get(writer.plan.number), writer.event("resumed")
                require(holder is not None, f"{url}: process {writer.plan.number} took a term of another")
                assert holder is not None
                assert resumed is not None
                same = holder.base == resumed.values["step"]
                require(same, f"{url}: {holder} goes on from step {resumed.values['step']}")

    def require_objects(self) -> None:
        """Every object that counts verifies, and every object was written by the holder of its term."""
        holding = {each.term: each.number for each in self.terms}
        for file in counting(self.client, self.terms):
            with never(DistrustError, f"{self.client.location}: "):
                header = fetch.verify(self.client, file).header
            number = header.run_info["extra"]["number"]
            # A file that was saved by a process before it, and found on its disk, keeps that one's number.
            require(
                number <= holding[file.term],
                f"{self.client.location}/{file.key}: written by process {number}, and the term is that of "
                f"{holding[file.term]}",
            )

    def require_resumed(self, writer: Writer) -> None:
        """It resumed from what counts, and from the newest of that."""
        resumed, holder = writer.event("resumed"), self._term_of.get(writer.plan.number)
        if resumed is None or holder is None:
            return
        step, writers = resumed.values["step"], resumed.values["writers"]
        previous = [each for each in self.terms if each.term < holder.term]
        where = f"{self.client.location}: process {writer.plan.number}"
        for past, number in enumerate(writers, 1):
            maker = self._term_of.get(number)
            if maker is None:
                require(number == 0, f"{where} resumed step {past} from process {number}, which has no term")
                continue
            for each in previous:
                if maker.term < each.term:
                    text = f"{where} resumed step {past} from {maker}; {each} had taken over before it"
                    require(past <= each.base, text)
        for earlier in self.writers if not writer.misread else ():
            owner = self._term_of.get(earlier.plan.number)
            if owner is None or owner.term >= holder.term:
                continue
            # Only its newest one: a rule removed those before it, also if it does not count any more.
            claims = [event.values["step"] for event in earlier.events("mirrored") if event.at < writer.began]
            bases = [each.base for each in previous if each.term > owner.term]
            if claims and all(max(claims) <= base for base in bases):
                text = f"{where} resumed from step {step}; {owner} had said that {max(claims)} is there"
                require(step >= max(claims), text)

    def require_kept(self, writer: Writer) -> None:
        """The final state, and what a rule keeps, is there of a process that had a store in the end."""
        holder, every = self._term_of.get(writer.plan.number), writer.plan.keep_every_there
        steps = {file.step for file in counting(self.client, self.terms)}
        require(writer.plan.steps in steps, f"{self.client.location}: the final state is not there")
        if holder is None or every is None:
            return
        for step in range(holder.base + 1, writer.plan.steps):
            is_kept = step % every == 0 and step % writer.plan.save_every == 0
            text = f"{self.client.location}: step {step} is not there; {holder} saved it, and a rule keeps it"
            require(not is_kept or step in steps, text)

    def require_answers(self) -> None:
        """A process that was replaced is told so; one that was not is not."""
        for writer, code in zip(self.writers, self.codes, strict=True):
            where = f"{self.client.location}: process {writer.plan.number}"
            holder = self._term_of.get(writer.plan.number)
            if code == REPLACED:
                is_last = holder is not None and holder.term == len(self.terms)
                require(not is_last, f"{where} was told that it was replaced, and nobody did")
            if code == REFUSED:
                text = f"{where} was refused because of itself"
                message = writer.events("refused")[0].values["message"]
                require(f"pid {writer.pid} " not in message, text)
            ending = writer.event("ending")
            if code == FINISHED and holder is not None and ending is not None:
                for later in self.writers:
                    took, next_holder = later.event("took"), self._term_of.get(later.plan.number)
                    if took is None or next_holder is None or next_holder.term <= holder.term:
                        continue
                    replaced = took.at < ending.at and next_holder.base < writer.plan.steps
                    require(not replaced, f"{where} was not told that {next_holder} had replaced it")
