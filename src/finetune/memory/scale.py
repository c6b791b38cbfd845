"""Chooses a hub model and a batch size that the machine's free memory can hold."""

from dataclasses import dataclass

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class Scale:
    """A model to test with and how many rows it trains on at once."""

    model: str
    batch_size: int


_LADDER = ((16, Scale("microsoft/DialoGPT-small", 4)), (8, Scale("distilgpt2", 2)))
"""(more than this many GiB available, what fits): the strategy's resource scaling."""


def scale_to_memory(available: int) -> Scale | None:
    """The largest hub model whose training fits into `available` bytes; None where only a shipped model does."""
    return next((scale for least, scale in _LADDER if available > least * GIB), None)


def available_memory() -> int:
    """Bytes that could be used now without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)
