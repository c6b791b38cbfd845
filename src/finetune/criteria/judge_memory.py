"""Judges whether LoRA needs less memory than full fine-tuning, on two real runs at the same sizes."""

from finetune.criteria.evidence import Evidence, MemoryEvidence, MemoryMeasure
from finetune.criteria.validator import MIN_MEMORY_REDUCTION, TrainingSuccessValidator
from finetune.criteria.verdicts import NOT_MEASURED, TITLES, verdict
from finetune.errors import EvidenceError
from finetune.records import Outcome, Verdict

_RESOLVABLE_RSS = 256 * 1024**2
"""Below this many bytes above the framework, the resident set is mostly library pages and allocator slack."""
_ALLOWED = "> 30% less"


def judge_memory(evidence: Evidence) -> list[Verdict]:
    """Verdicts on criterion 3; `inconclusive` where it was not measured, `not applicable` where it cannot be.

    Raises:
        EvidenceError: the two runs were not measured at the same sizes.
    """
    if evidence.memory is None:
        reason = evidence.why.get("memory", "the two runs were not made")
        outcome = Outcome.NOT_APPLICABLE if "memory" in evidence.unable else Outcome.INCONCLUSIVE
        return [verdict(key, outcome, NOT_MEASURED, _ALLOWED, reason) for key in TITLES[2]]
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
    outcome = Outcome.of(less > MIN_MEMORY_REDUCTION)
    reason = f"peak of live tensors at {lora.batch_size} x {lora.length} tokens, {lora.dtype}, each in a fresh process"
    if outcome == Outcome.FAILED:
        reason += "; activations and logits outweigh what LoRA saves at these sizes"
    measured = f"{_say_less(less)} ({_megabytes(lora.peak_tensors)} against {_megabytes(full.peak_tensors)})"
    return verdict("memory-efficiency", outcome, measured, _ALLOWED, reason, reduction=less)


def _judge_exact(memory: MemoryEvidence) -> Verdict:
    lora = memory.lora.gradient_bytes + memory.lora.optimizer_bytes
    full = memory.full.gradient_bytes + memory.full.optimizer_bytes
    less = TrainingSuccessValidator.memory_reduction(full, lora)
    measured = f"{_say_less(less)} ({_megabytes(lora)} against {_megabytes(full)})"
    reason = "the exact part: bytes of gradients and AdamW moments"
    outcome = Outcome.of(less > MIN_MEMORY_REDUCTION)
    return verdict("memory-exact", outcome, measured, _ALLOWED, reason, reduction=less)


def _judge_resident(memory: MemoryEvidence) -> Verdict:
    lora, full = memory.lora.rss_above_framework, memory.full.rss_above_framework
    # Not the validator's figure: a run so small that it adds nothing to the frameworks is no missing evidence.
    less = (full - lora) / full if full > 0 else 0.0
    measured = f"{_say_less(less)} ({_megabytes(lora)} against {_megabytes(full)})"
    outcome = Outcome.of(less > MIN_MEMORY_REDUCTION)
    reason = f"peak resident set above the {_megabytes(memory.lora.framework_rss)} of the frameworks"
    if full < _RESOLVABLE_RSS:
        outcome = Outcome.NOT_APPLICABLE
        reason += f"; below {_megabytes(_RESOLVABLE_RSS)} it is mostly library pages and allocator slack"
    return verdict("memory-resident", outcome, measured, _ALLOWED, reason, reduction=less)
