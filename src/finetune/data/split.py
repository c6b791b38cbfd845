"""Holds rows out for validation; a pure function of the rows and the seed."""

import hashlib
from collections.abc import Sequence

from finetune.data.shape import Example
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


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into (train, held out) with about `fraction` of the rows held out.

    Equal rows always land on the same side, so that nothing held out is ever trained on. A positive fraction holds
    out at least one distinct row and leaves at least one, where there are two.
    """
    keys = [content_key(example) for example in examples]
    distinct = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    count = round(fraction * len(distinct))
    if fraction > 0:
        count = min(max(count, 1), len(distinct) - 1)
    held = set(distinct[:count])
    train = [example for example, key in zip(examples, keys, strict=True) if key not in held]
    return train, [example for example, key in zip(examples, keys, strict=True) if key in held]
