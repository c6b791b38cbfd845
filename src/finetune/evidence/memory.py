"""Measures what training takes, in a fresh process for each method, so that nothing else is counted."""

from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from typing import Literal

from finetune.criteria.evidence import MemoryMeasure
from finetune.errors import UsageError
from finetune.memory.estimate import estimate_memory
from finetune.memory.forecast import forecast_memory
from finetune.memory.framework import FRAMEWORKS
from finetune.memory.load import full_load
from finetune.processes import ask_child
from finetune.records import AdapterTarget, ModelLocation
from finetune.training.prepare import Prepared


def measure_memory(
    backend: str,
    location: ModelLocation,
    target: AdapterTarget,
    *,
    method: Literal["lora", "full"],
    sizes: Mapping[str, object],
) -> MemoryMeasure:
    """Train a few steps in a fresh process and return what it measured.

    Args:
        sizes: batch_size (rows), length (tokens), dtype, vocab_size and, where there is one, gradient_checkpointing and
            `quantize`, a `Quantization` as a mapping: equal for both methods, or they cannot be compared.

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


def full_needs(prepared: Prepared) -> int:
    """Bytes that full fine-tuning takes at most at the measured sizes; where nobody measured the backend, at least."""
    config = prepared.plan.config
    if config.backend not in FRAMEWORKS:
        return estimate_memory(prepared.shape, None, config.model.dtype).total
    again = config.training.gradient_checkpointing
    load = full_load(config.judge.memory_batch_size, config.judge.memory_length, recomputed=again)
    return forecast_memory(prepared.shape, None, config.model.dtype, load, FRAMEWORKS[config.backend]).high.total


def measure_framework(backend: str) -> int:
    """The resident bytes of a fresh process that has loaded a backend's libraries and trained on a dozen numbers.

    Raises:
        UsageError: the backend has no means to measure it.
        EvidenceError: the process failed.
    """
    module = f"finetune.backends.{backend}.probe"
    if find_spec(module) is None:
        raise UsageError(f"the {backend} backend has no means to measure memory", hint="use its documented figures")
    return int(ask_child(module, {"method": "framework"})["framework_rss"])
