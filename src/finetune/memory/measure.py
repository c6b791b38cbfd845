"""Measures what training takes, in a fresh process for each method, so that nothing else is counted."""

from dataclasses import asdict
from typing import Any, Literal

from finetune.children import ask_child
from finetune.records import AdapterTarget, MemoryMeasure, ModelLocation


def measure_memory(
    backend: str,
    location: ModelLocation,
    target: AdapterTarget,
    *,
    method: Literal["lora", "full"],
    sizes: dict[str, Any],
) -> MemoryMeasure:
    """Train a few steps in a fresh process and return what it measured.

    Args:
        sizes: batch_size (rows), length (tokens), dtype and vocab_size: equal for both methods, or they cannot be
            compared.

    Raises:
        EvidenceError: the process failed.
    """
    request = {
        "folder": str(location.folder),
        "name": location.name,
        "source": location.source,
        "method": method,
        "target": asdict(target),
        **sizes,
    }
    return MemoryMeasure(**ask_child(f"finetune.backends.{backend}.probe", request))
