"""Makes the extra runs, within the budget: the shuffled-label control, and LoRA against full fine-tuning in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

from finetune.criteria.evidence import ControlEvidence, Looked, MemoryEvidence
from finetune.errors import EvidenceError
from finetune.evidence.memory import full_needs, measure_memory
from finetune.evidence.observe import Observation
from finetune.memory.advise import say_size
from finetune.processes import available_memory
from finetune.records import TokenizedRow
from finetune.training.prepare import Prepared, shuffled_rows


@dataclass(frozen=True, slots=True)
class Trainings(Generic[Looked]):
    """What a run did, and what it can do and ask for the sake of the control.

    Attributes:
        kept: the step whose weights the run keeps.
        checkpoints: the steps whose weights are on disk.
        control: gives what is looked at after so many of the run's steps on other rows; must be called even for no
            step, since the other processes wait for the number.
        tuned: gives the same of the tuned model as it was after one of the `checkpoints`.
    """

    kept: int
    checkpoints: Sequence[int]
    control: Callable[[Sequence[TokenizedRow], int], Looked | None]
    tuned: Callable[[int], Looked]


def has_control(prepared: Prepared) -> bool:
    """Whether there is something to compare with a control: answers to questions, or gains of pairs."""
    return bool(prepared.questions or prepared.pairs)


def shuffled_label_rows(prepared: Prepared, why: dict[str, str]) -> Sequence[TokenizedRow] | None:
    """The rows that the shuffled-label control is trained on; None where there is to be none."""
    if not has_control(prepared):
        return None
    if prepared.plan.config.judge.control == "never":
        why["control"] = "switched off (judge.control=never)"
        return None
    rows = shuffled_rows(prepared)
    if not rows:
        why["control"] = "one answer fills half of the rows, so answers cannot be shuffled"
    return rows


def control_evidence(
    prepared: Prepared,
    before: Observation,
    trainings: Trainings[Looked],
    learned: Callable[[Looked], bool],
    why: dict[str, str],
) -> ControlEvidence[Looked] | None:
    """What is made of a model that was trained on shuffled answers, for as many steps as the budget allows.

    A shortened control is compared with the tuned model as it was after as many steps, and is not trained where that
    model itself had not yet `learned` enough for any comparison.
    """
    rows = shuffled_label_rows(prepared, why)
    if rows is None:
        return None
    budget, kept, tuned = before.asked.budget, trainings.kept, None
    steps = kept
    if prepared.plan.config.judge.control == "auto" and budget.control_steps < kept:
        steps = max((step for step in trainings.checkpoints if step <= budget.control_steps), default=0)
    dear = f"{budget.too_dear(budget.control(kept))}; judge.control=always runs it all the same"
    if steps == 0:
        why["control"] = dear
    elif steps < kept:
        tuned = trainings.tuned(steps)
        if not learned(tuned):
            why["control"] = f"{dear}; a shorter one cannot be compared: at step {steps} the model had not yet learned"
            steps = 0
    found = trainings.control(rows, steps)
    return ControlEvidence(found, steps, tuned) if found else None


def why_no_memory(prepared: Prepared, before: Observation, *, able: bool) -> str:
    """Why memory is not to be measured: it means nothing here, is too dear, or would not fit; empty where it is."""
    config, budget = prepared.plan.config, before.asked.budget
    if prepared.target is None:
        return "the whole model is trained (adapter.kind is full): there is no adapter to compare with that"
    if prepared.shape.quantized:
        return "the base is quantised: it cannot be fully fine-tuned, so there is nothing to compare with"
    if not able:
        return f"the {config.backend} backend has no means to measure it"
    if config.judge.memory == "never":
        return "switched off (judge.memory=never)"
    if config.judge.memory == "auto" and not budget.memory_fits:
        return f"{budget.too_dear(budget.memory)}; judge.memory=always measures it all the same"
    needs, have = full_needs(prepared), available_memory()
    if needs > have:
        return (
            f"full fine-tuning may need {say_size(needs)} here, and {say_size(have)} are free: it would end for want "
            "of memory (lower judge.memory_batch_size or judge.memory_length, or measure on a larger machine)"
        )
    return ""


def memory_evidence(prepared: Prepared, why: dict[str, str]) -> MemoryEvidence | None:
    """LoRA and full fine-tuning, each measured in a fresh process at the same sizes; None where that failed."""
    config = prepared.plan.config
    assert prepared.target is not None
    sizes = {
        "batch_size": config.judge.memory_batch_size,
        "length": config.judge.memory_length,
        "dtype": config.model.dtype,
        "vocab_size": prepared.shape.vocab_size,
        "gradient_checkpointing": config.training.gradient_checkpointing,
    }
    try:
        lora = measure_memory(config.backend, prepared.location, prepared.target, method="lora", sizes=sizes)
        full = measure_memory(config.backend, prepared.location, prepared.target, method="full", sizes=sizes)
    except EvidenceError as error:
        why["memory"] = f"the measurement failed: {error.message}"
        return None
    return MemoryEvidence(lora, full)
