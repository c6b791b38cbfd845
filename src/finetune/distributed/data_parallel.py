"""Lets several processes train one model: each computes its shares of every batch, and all of them end alike.

Gradients are summed once an optimizer step, all tensors in one piece, before they are clipped. An adapter is small, so
that this costs less than to sum each tensor while the backward pass goes on, as is done for whole models; and because
each share's loss is divided by the tokens of the whole step beforehand, the sum is that step's gradient as it stands.
"""

import hashlib
import json
import random
from collections.abc import Mapping
from typing import Any, cast

from finetune.errors import RefusedError
from finetune.ports import Group, Objective, Session
from finetune.records import Batch


class SingleProcess:
    """A process that trains without others; implements `ports.Group`."""

    rank = 0
    size = 1
    in_step = False

    def total(self, value: float) -> float:
        """The number itself."""
        return value

    def sum(self, tensor: object) -> Any:
        """The tensor itself."""
        return tensor

    def divide(self, session: Session) -> None:
        """Nobody to share weights with."""

    def restore(self, session: Session) -> None:
        """Nothing was given away."""


def data_parallel(session: Session, group: Group, *, shares: int, seed: int, done_steps: int = 0) -> Session:
    """The session that the training loop sees: all processes of the group do together what it is asked.

    Every batch is dealt into `shares`, and each process computes every `group.size`-th of them. What a share draws at
    random depends on seed, step and share alone: whoever computes it, and also after a resume, it comes out the same.
    Without others and with one share only, this is the session itself.
    """
    if group.size == shares == 1:
        return session
    return cast("Session", _DataParallelSession(session, group, shares, seed, done_steps))


class _DataParallelSession:
    """A session that computes its own shares of each batch; everything else is the session's own."""

    def __init__(self, session: Session, group: Group, shares: int, seed: int, done_steps: int) -> None:
        self._session = session
        self._group = group
        self._shares = shares
        self._seed = seed
        self._step = done_steps
        self._batch = 0
        self._pooled = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def accumulate(self, batch: Batch, weight: float, *objective: Objective) -> float:
        """Add `weight` x (the loss of this process's shares) to its gradients; returns the whole batch's loss."""
        shares = batch.shard(self._shares)
        loss = 0.0
        for first in range(0, self._shares, self._group.size):
            number = first + self._group.rank
            mine = shares[number] if number < self._shares else Batch(())
            if mine.rows:
                draw = random.Random(f"share-{self._seed}-{self._step}-{self._batch}-{number}")
                self._session.reseed(draw.getrandbits(63))
                loss += self._session.accumulate(mine, weight, *objective)
            elif self._group.in_step:
                # The others wait for the weights that this process holds: any row will do, and it counts for nothing.
                self._session.accumulate(Batch(batch.rows[:1]), 0.0, *objective)
        self._batch += 1
        self._pooled = False
        return self._group.total(loss)

    def gradient_norms(self) -> dict[str, float]:
        self._pool()
        return self._session.gradient_norms()

    def clip_gradients(self) -> float:
        self._pool()  # every process sees the same sum, so all clip alike
        return self._session.clip_gradients()

    def update(self, learning_rate: float) -> None:
        self._session.update(learning_rate)
        self._step += 1
        self._batch = 0

    def _pool(self) -> None:
        if not self._pooled and self._group.size > 1:
            self._session.pool_gradients(self._group)
        self._pooled = True


def check_same(group: Group, facts: Mapping[str, object]) -> None:
    """Refuse to train where one process of the group sees other settings, data, weights or checkpoints.

    Raises:
        RefusedError: they do not agree; what they disagree on is named.
    """
    if group.size == 1:
        return
    marks = {}
    for name, value in facts.items():
        digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()
        # Below 2**40, so that the sum over thousands of processes is exact.
        marks[name] = float(int.from_bytes(digest[:5], "big"))
    differing = [name for name, mark in marks.items() if group.total(mark) != mark * group.size]
    if differing:
        raise RefusedError(
            f"the processes of this run do not agree on: {', '.join(differing)}",
            hint="give every process the same files, settings and versions; --output must be a folder they all see",
        )
