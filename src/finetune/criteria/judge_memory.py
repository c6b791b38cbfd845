"""Judges whether LoRA needs less memory than full fine-tuning, on two real runs at the same sizes."""

from finetune.criteria.evidence import Evidence, MemoryEvidence
from finetune.criteria.validator import MIN_MEMORY_REDUCTION, TrainingSuccessValidator
from finetune.errors import EvidenceError
from finetune.records import MemoryMeasure, Outcome, Verdict

_RESOLVABLE_RSS = 256 * 1024**2
"""Below this many bytes above the framework, the resident set is mostly library pages and allocator slack."""
_TITLES = {
    "memory-efficiency": "LoRA needs less memory than full fine-tuning",
    "memory-exact": "Gradients and moments shrink with what is trained",
    "memory-resident": "The resident set shrinks too",
}


def judge_memory(evidence: Evidence) -> list[Verdict]:
    """Verdicts on criterion 3; `undecided` where it was not measured, `not applicable` where it cannot be.

    Raises:
        EvidenceError: the two runs were not measured at the same sizes.
    """
    if evidence.memory is None:
        reason = evidence.why.get("memory", "the two runs were not made")
        outcome: Outcome = "not applicable" if "memory" in evidence.unable else "undecided"
        return [
            Verdict(key, title, 3, outcome, "not measured", "> 30 % less", reason, companion=key != "memory-efficiency")
            for key, title in _TITLES.items()
        ]
    lora, full = evidence.memory.lora, evidence.memory.full
    if _sizes(lora) != _sizes(full):
        raise EvidenceError(f"memory was measured at different sizes: {_sizes(lora)} and {_sizes(full)}")
    return [_judge_tensors(evidence.memory), _judge_exact(evidence.memory), _judge_resident(evidence.memory)]


def _sizes(measure: MemoryMeasure) -> tuple[object, ...]:
    return measure.batch_size, measure.length, measure.dtype, measure.steps


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _say_less(share: float) -> str:
    return f"{abs(share):.0%} {'less' if share >= 0 else 'more'}"


def _judge_tensors(memory: MemoryEvidence) -> Verdict:
    lora, full = memory.lora, memory.full
    less = TrainingSuccessValidator.memory_reduction(full.peak_tensors, lora.peak_tensors)
    outcome: Outcome = "holds" if less > MIN_MEMORY_REDUCTION else "broken"
    reason = f"peak of live tensors at {lora.batch_size} x {lora.length} tokens, {lora.dtype}, each in a fresh process"
    if outcome == "broken":
        reason += "; activations and logits outweigh what LoRA saves at these sizes"
    return Verdict(
        "memory-efficiency",
        _TITLES["memory-efficiency"],
        3,
        outcome,
        f"{_say_less(less)} ({_megabytes(lora.peak_tensors)} against {_megabytes(full.peak_tensors)})",
        "> 30 % less",
        reason,
        numbers={"reduction": less},
    )


def _judge_exact(memory: MemoryEvidence) -> Verdict:
    lora = memory.lora.gradient_bytes + memory.lora.optimizer_bytes
    full = memory.full.gradient_bytes + memory.full.optimizer_bytes
    less = TrainingSuccessValidator.memory_reduction(full, lora)
    return Verdict(
        "memory-exact",
        _TITLES["memory-exact"],
        3,
        "holds" if less > MIN_MEMORY_REDUCTION else "broken",
        f"{_say_less(less)} ({_megabytes(lora)} against {_megabytes(full)})",
        "> 30 % less",
        "the exact part: bytes of gradients and AdamW moments",
        companion=True,
        numbers={"reduction": less},
    )


def _judge_resident(memory: MemoryEvidence) -> Verdict:
    lora, full = memory.lora.rss_above_framework, memory.full.rss_above_framework
    # Not the validator's figure: a run so small that it adds nothing to the frameworks is no missing evidence.
    less = (full - lora) / full if full > 0 else 0.0
    measured = f"{_say_less(less)} ({_megabytes(lora)} against {_megabytes(full)})"
    outcome: Outcome = "holds" if less > MIN_MEMORY_REDUCTION else "broken"
    reason = f"peak resident set above the {_megabytes(memory.lora.framework_rss)} of the frameworks"
    if full < _RESOLVABLE_RSS:
        outcome = "not applicable"
        reason += f"; below {_megabytes(_RESOLVABLE_RSS)} it is mostly library pages and allocator slack"
    return Verdict(
        "memory-resident",
        _TITLES["memory-resident"],
        3,
        outcome,
        measured,
        "> 30 % less",
        reason,
        companion=True,
        numbers={"reduction": less},
    )
