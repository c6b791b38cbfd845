"""Processes that train together, played by threads: the group that they see is as strict as a real one."""

import threading
from collections.abc import Callable
from typing import Any

from finetune.errors import LostProcessError


class ThreadGroup:
    """So many members; what each of them hands in is added up in the order of their ranks, when the last one has."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.handed_in: list[Any] = [None] * size

    def run(self, work: Callable[["ThreadRank"], Any]) -> list[Any]:
        """What the work of each member came to: its result, or its error."""
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                results[rank] = work(ThreadRank(self, rank))
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class ThreadRank:
    """One of them; implements `ports.Group`."""

    in_step = False

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self.group = group
        self.rank = rank
        self.size = group.size

    def total(self, value: float) -> float:
        """The sum of a number."""
        return float(self.sum(value))

    def sum(self, tensor: Any) -> Any:
        """The sum of a tensor."""
        try:
            self.group.handed_in[self.rank] = tensor
            self.group.barrier.wait()
            found = self.group.handed_in[0]
            for other in self.group.handed_in[1:]:
                found = found + other
            self.group.barrier.wait()
        except threading.BrokenBarrierError:
            raise LostProcessError(f"rank {self.rank} has lost another process of this run: it is gone") from None
        return found

    def divide(self, session: Any) -> None:
        """Nothing is shared out."""

    def restore(self, session: Any) -> None:
        """Nothing was given away."""


def good(results: list[Any]) -> list[Any]:
    """The results, none of which may be an error."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
