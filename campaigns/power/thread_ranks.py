"""Ranks that are threads of this process, for checkpoints that several ranks write together."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

from distrust.errors import RankLost


class ThreadWorld:
    """What threads tell and give each other. A thread that ends with an error is lost for the others.

    ``at_word`` is called whenever all have told a word, while none goes on.
    """

    def __init__(self, count: int, at_word: Callable[[], None] = lambda: None) -> None:
        self.count = count
        self._at_word = at_word
        self._changed = threading.Condition()
        self._lost = False
        self._meetings = [0] * count  # of each thread so far
        self._values: dict[int, dict[int, Any]] = {}  # by number of the meeting, and thread

    def meet(self, index: int, value: Any, *, is_word: bool = False) -> list[Any]:
        """The values of all threads; RankLost if one has ended without giving its own."""
        with self._changed:
            number = self._meetings[index]
            self._meetings[index] += 1
            values = self._values.setdefault(number, {})
            values[index] = value
            if len(values) == self.count and is_word:
                self._at_word()
            self._values.pop(number - 2, None)
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(values) == self.count or self._lost, timeout=20)
            if len(values) < self.count:
                raise RankLost("a thread has ended")
            return [values[rank] for rank in range(self.count)]

    def lose(self) -> None:
        """Let the threads that wait for another one go on."""
        with self._changed:
            self._lost = True
            self._changed.notify_all()

    def run(self, work: Callable[[ThreadPeers], Any]) -> list[Any]:
        """What ``work`` returns on each rank, or the error that it raises."""
        results: list[Any] = [None] * self.count

        def run_one(index: int) -> None:
            try:
                results[index] = work(ThreadPeers(self, index))
            except BaseException as error:
                results[index] = error
                self.lose()

        threads = [threading.Thread(target=run_one, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class ThreadPeers:
    """The peers of a shared save, as one thread sees them."""

    local_count = 1

    def __init__(self, world: ThreadWorld, index: int) -> None:
        self.world, self.index, self.count = world, index, world.count
        self.blocks: list[int] = []  # sizes of what was received

    def tell(self, value: Any) -> list[Any]:
        texts = self.world.meet(self.index, json.dumps(value), is_word=True)
        return [json.loads(text) for text in texts]

    def exchange(self, sent: Any, sent_sizes: Sequence[int], received: Any, sizes: Sequence[int]) -> None:
        starts = [sum(sent_sizes[:rank]) for rank in range(self.count)]
        parts = [bytes(sent[start : start + size]) for start, size in zip(starts, sent_sizes, strict=True)]
        mine = [each[self.index] for each in self.world.meet(self.index, parts)]
        assert [len(part) for part in mine] == list(sizes)
        self.blocks.append(sum(sizes))
        received[: sum(sizes)] = b"".join(mine)
