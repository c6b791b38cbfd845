"""Evidence of a healthy run, to be judged as it is and with one thing wrong at a time."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from finetune.criteria.evidence import (
    ArtifactEvidence,
    ControlEvidence,
    Evidence,
    LearningEvidence,
    LossEvidence,
    MemoryEvidence,
    MemoryMeasure,
    ParameterEvidence,
)
from finetune.criteria.judge import judge
from finetune.records import Answer, Reload, Scores, Verdict

COUNT = 20
VERDICTS = (
    "loss-convergence",
    "loss-fixed-batches",
    "loss-start",
    "loss-held-out",
    "model-learning",
    "learning-signed",
    "learning-control",
    "learning-retention",
    "memory-efficiency",
    "memory-exact",
    "memory-resident",
    "parameter-updates",
    "parameter-exactly",
    "parameter-first-step",
    "artifacts",
    "artifacts-no-strays",
    "artifacts-reload",
)
ADAPTER = tuple(f"layers.{layer}.q_proj.lora_{side}.default.weight" for layer in range(5) for side in "AB")
FROZEN = tuple(f"layers.{layer}.q_proj.base_layer.weight" for layer in range(5))


def scores(right: Sequence[bool] | int, count: int = COUNT) -> Scores:
    """Scores with these answers right, or with the first so many."""
    marks = [index < right for index in range(count)] if isinstance(right, int) else right
    return Scores(tuple(Answer(f"question {n}", "yes", "yes" if mark else "no", mark) for n, mark in enumerate(marks)))


def measure(method: Any, peak: int, trainable: int, **changes: Any) -> MemoryMeasure:
    """What a process measured."""
    healthy = MemoryMeasure(
        method=method,
        batch_size=4,
        length=96,
        dtype="float32",
        steps=3,
        framework_rss=400_000_000,
        peak_rss=400_000_000 + 10 * peak,
        peak_tensors=peak,
        gradient_bytes=4 * trainable,
        optimizer_bytes=8 * trainable,
        weight_bytes=4_000_000,
    )
    return dataclasses.replace(healthy, **changes)


def healthy(**parts: Any) -> Evidence:
    """Everything measured, and everything fine; `parts` replace whole parts."""
    everything: dict[str, Any] = {
        "loss": LossEvidence((4.0, 3.0, 1.0), 4.1, 0.9, 512, 4.2, 3.9),
        "parameters": ParameterEvidence(
            before=dict.fromkeys(ADAPTER + FROZEN, "old"),
            after={**dict.fromkeys(ADAPTER, "new"), **dict.fromkeys(FROZEN, "old")},
            declared=ADAPTER,
            first_gradients={name: 0.5 if "lora_B" in name else 0.0 for name in ADAPTER},
            steps=3,
        ),
        "artifacts": ArtifactEvidence(
            {"adapter/adapter_model.safetensors": 9_000}, Reload(8, 12, 1e-5, 3, 1e-4, 1.6e-3)
        ),
        "learning": LearningEvidence(scores(0), scores(19), ControlEvidence(scores(1)), scores(18), scores(17)),
        "memory": MemoryEvidence(measure("lora", 50_000_000, 10_000), measure("full", 100_000_000, 1_000_000)),
    }
    return Evidence(**{**everything, **parts})


def altered(part: str, **changes: Any) -> Evidence:
    """Healthy evidence with some fields of one part changed."""
    return healthy(**{part: dataclasses.replace(getattr(healthy(), part), **changes)})


def verdicts_on(evidence: Evidence) -> dict[str, Verdict]:
    """The verdicts by id."""
    found = judge(evidence)
    assert tuple(verdict.id for verdict in found) == VERDICTS
    return {verdict.id: verdict for verdict in found}
