"""Holds rows out for validation; a pure function of the rows and the seed."""

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np

from finetune.data.shape import Example
from finetune.data.stored import in_parts, pick
from finetune.records import Document


def content_key(example: Example) -> str:
    """A hash of what an example says, wherever it stood."""
    if isinstance(example, Document):
        parts = ["text", example.text]
    else:
        parts = [part for message in example.messages for part in (message.role, message.content)]
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
    """Split into (train, held out) with about `fraction` of the rows held out.

    Equal rows always land on the same side, so that nothing held out is ever trained on. A positive fraction holds
    out at least one distinct row and leaves at least one, where there are two.
    """
    if not fraction > 0 or not examples:
        return examples, ()

    def orders_of(some: Sequence[Example], start: int) -> bytes:
        return b"".join(hashlib.sha256(f"{seed}:{content_key(each)}".encode()).digest() for each in some)

    orders = b"".join(in_parts(examples, orders_of))
    # Of 32 bytes beside 32, zeros at the end, which NumPy leaves out, decide nothing.
    distinct, place = np.unique(np.frombuffer(orders, "S32"), return_inverse=True)
    held = place < min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)
    train, out = (array("q", np.flatnonzero(side).tobytes()) for side in (~held, held))
    return pick(examples, train), pick(examples, out)
