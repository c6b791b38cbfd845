"""The load of one training step: its rows, their length, and the tokens with loss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune.config.schema import TrainingSpec
from finetune.records import Batch


@dataclass(frozen=True, slots=True)
class StepLoad:
    """The batch that a step holds: `rows` sequences, each `length` tokens long, with `targets` tokens that carry loss.

    `masked` says that an attention mask is needed, because rows share a sequence; `accumulation` is how many such
    batches are added up before the weights move; `recomputed` that blocks are computed again for their gradients.
    """

    rows: int
    length: int
    targets: int
    masked: bool = False
    accumulation: int = 1
    recomputed: bool = False

    @property
    def tokens(self) -> int:
        """How many tokens go through the model at once, padding counted."""
        return self.rows * self.length

    @property
    def lightest(self) -> "StepLoad":
        """The same rows with one trained token each, each in a sequence of its own."""
        return replace(self, targets=min(self.targets, self.rows), masked=False)

    @property
    def heaviest(self) -> "StepLoad":
        """The same rows with every token trained."""
        return replace(self, targets=max(self.targets, self.rows * (self.length - 1)))


def full_load(rows: int, length: int, accumulation: int = 1, *, recomputed: bool = False) -> StepLoad:
    """The most that a configuration allows: every row as long as it may be, every token but its first a target."""
    return StepLoad(rows, length, rows * (length - 1), accumulation=accumulation, recomputed=recomputed)


def planned_load(training: TrainingSpec, length: int) -> StepLoad:
    """The same by its settings; the two sides of a pair share a sequence, each as long as a row may be."""
    again = training.gradient_checkpointing
    load = full_load(training.batch_size, length, training.gradient_accumulation_steps, recomputed=again)
    if training.objective == "dpo":
        load = replace(load, length=2 * length, targets=2 * load.targets, masked=True)
    return load


def load_of(batches: Sequence[Batch], accumulation: int = 1, *, recomputed: bool = False) -> StepLoad:
    """What the largest of these batches holds.

    Args:
        batches: at least one, as training is given them.
    """
    loads = []
    for batch in batches:
        lengths = [sum(len(row.ids) for row in sequence) for sequence in batch.sequences]
        loads.append(
            StepLoad(len(lengths), max(lengths), batch.target_count, bool(batch.packed), accumulation, recomputed)
        )
    return max(loads, key=lambda load: (load.tokens, load.targets))
