"""Names encoded rows by what they were encoded from, and turns them into bytes and back."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from finetune.chat.encode import Marked, is_document
from finetune.chat.tokenizer import FileTokenizer
from finetune.records import Rendered

_FORMAT = 2
"""Changes whenever `encode` would make other ids or marks of the same rows."""
_DIGEST_BYTES = 32


def cache_key(rows: Sequence[Rendered], tokenizer: FileTokenizer) -> str:
    """The name of these rows' ids and marks: it changes exactly when something changes that they are made from.

    That is the rendered text with its marks, and the tokenizer; not where the rows stood, nor how long they may be.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, tokenizer.identity()]).encode())
    for row in rows:
        parts = [[segment.text, segment.trained, segment.control] for segment in row.segments]
        digest.update(json.dumps([parts, is_document(row)]).encode() + b"\n")
    return digest.hexdigest()


def dump_marked(rows: Sequence[Marked]) -> bytes:
    """The rows as bytes: a SHA-256 of the rest, then safetensors with ids, marks and lengths."""
    tensors = {
        "ids": np.array([token for row in rows for token in row.ids], np.int32),
        "marks": np.frombuffer(b"".join(row.marks for row in rows), np.uint8),
        "lengths": np.array([len(row.ids) for row in rows], np.int64),
    }
    body: bytes = save(tensors)
    return hashlib.sha256(body).digest() + body


def load_marked(content: bytes, rows: Sequence[Rendered]) -> list[Marked] | None:
    """The rows that `dump_marked` wrote; None when the bytes are torn, changed, or of other rows."""
    digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        return None
    try:
        tensors = load(body)
        ids, marks, lengths = tensors["ids"].tolist(), tensors["marks"].tobytes(), tensors["lengths"].tolist()
    except (SafetensorError, KeyError):
        return None
    if len(lengths) != len(rows) or not sum(lengths) == len(ids) == len(marks):
        return None
    found: list[Marked] = []
    end = 0
    for row, length in zip(rows, lengths, strict=True):
        start, end = end, end + length
        found.append(Marked(tuple(ids[start:end]), marks[start:end], row.where, is_document(row)))
    return found
