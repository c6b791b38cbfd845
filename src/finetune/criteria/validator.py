"""The strategy's five criteria, literally: public, plain, and only ever true on evidence that was measured."""

import math
from collections.abc import Mapping, Sequence

from finetune.errors import EvidenceError

MIN_LOSS_REDUCTION = 0.05
MIN_IMPROVED_SHARE = 0.3
MIN_MEMORY_REDUCTION = 0.3
MIN_CHANGED_SHARE = 0.8


class TrainingSuccessValidator:
    """Judges one fine-tune by the five criteria; every method refuses to judge without evidence."""

    @staticmethod
    def loss_reduction(losses: Sequence[float]) -> float:
        """By what share the last loss lies below the first (0.05 is 5%).

        Raises:
            EvidenceError: fewer than two losses, or one that is not finite, or a first loss that is not positive.
        """
        if len(losses) < 2:
            raise EvidenceError(f"loss convergence needs at least two recorded losses, got {len(losses)}")
        if not all(math.isfinite(loss) for loss in losses):
            raise EvidenceError("a recorded loss is not finite, so convergence cannot be judged")
        if losses[0] <= 0:
            raise EvidenceError(f"the first loss is {losses[0]}, so no reduction can be told")
        return (losses[0] - losses[-1]) / losses[0]

    @classmethod
    def validate_loss_convergence(cls, losses: Sequence[float]) -> bool:
        """Whether the training loss fell by more than 5% from the first to the last recorded step."""
        return cls.loss_reduction(losses) > MIN_LOSS_REDUCTION

    @staticmethod
    def improved_share(before: Sequence[str], after: Sequence[str], expected: Sequence[str]) -> float:
        """The share of cases answered wrongly before and rightly after; texts are compared as given.

        Raises:
            EvidenceError: no cases, or lists of unequal length.
        """
        if not expected or not len(before) == len(after) == len(expected):
            raise EvidenceError(
                f"model learning needs equally many answers: {len(before)} before, {len(after)} after, "
                f"{len(expected)} expected"
            )
        cases = zip(before, after, expected, strict=True)
        return sum(old != right and new == right for old, new, right in cases) / len(expected)

    @classmethod
    def validate_model_learning(
        cls, pre_outputs: Sequence[str], post_outputs: Sequence[str], test_cases: Sequence[str]
    ) -> bool:
        """Whether more than 30% of the responses improved."""
        return cls.improved_share(pre_outputs, post_outputs, test_cases) > MIN_IMPROVED_SHARE

    @staticmethod
    def memory_reduction(base_memory: float, lora_memory: float) -> float:
        """By what share LoRA needs less memory than full fine-tuning; both measured, in the same unit.

        Raises:
            EvidenceError: a figure is missing, not finite or not positive.
        """
        for name, value in (("full fine-tuning", base_memory), ("LoRA", lora_memory)):
            if not math.isfinite(value) or value <= 0:
                raise EvidenceError(f"the memory of {name} is {value}, which nobody can have measured")
        return (base_memory - lora_memory) / base_memory

    @classmethod
    def validate_memory_efficiency(cls, base_memory: float, lora_memory: float) -> bool:
        """Whether LoRA needs more than 30% less memory than full fine-tuning."""
        return cls.memory_reduction(base_memory, lora_memory) > MIN_MEMORY_REDUCTION

    @staticmethod
    def changed_share(before: Mapping[str, str], after: Mapping[str, str]) -> float:
        """The share of tensors whose fingerprint changed.

        Raises:
            EvidenceError: no tensors, or other names after than before.
        """
        if not before or before.keys() != after.keys():
            raise EvidenceError(
                f"parameter updates need the same tensors twice: {len(before)} before, {len(after)} after"
            )
        return sum(before[name] != after[name] for name in before) / len(before)

    @classmethod
    def validate_parameter_updates(cls, before: Mapping[str, str], after: Mapping[str, str]) -> bool:
        """Whether more than 80% of the adapter's tensors changed."""
        return cls.changed_share(before, after) > MIN_CHANGED_SHARE

    @staticmethod
    def validate_artifacts(files: Mapping[str, int]) -> bool:
        """Whether training left files and each of them has content; `files` maps path to size in bytes."""
        return bool(files) and all(size > 0 for size in files.values())
