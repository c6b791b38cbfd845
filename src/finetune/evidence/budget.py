"""Says what judging may cost and what its parts will: counted in tokens of training, so the same on every machine."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from finetune.abilities import ABILITIES
from finetune.data.batches import sequences_of, shared_start
from finetune.data.stored import sizes_of
from finetune.records import Batch, Question, TokenizedRow
from finetune.training.loop import steps_per_epoch
from finetune.training.prepare import Prepared, batch_of_all, pack_length

FREE = 2.4e12
"""So many operations judging may always take, whatever its share: some forty seconds of two processor cores.

Below it, whole criteria would go unjudged to save seconds: the shipped models take 1.8e12 for all of theirs.
"""
_PROCESS = 4e11
"""What it takes to start a process that loads a framework and a model: six seconds of two cores."""
_STEP, _WORD = 18, 2
"""A step of an answer reads all weights, for as long as scoring so many tokens takes, and then each prompt's word.

Measured on SmolLM2-135M with torch on a processor, for one prompt and for eight at once.
"""
LOOKS = 0.6
"""The share of the budget that looks at the base and the tuned model may take; the extra runs have the rest."""
_MEMORY_STEPS = 4
_FULL_STEP = 1.5
"""What a step of full fine-tuning costs, in steps that need no gradients of the base's weights."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What things cost in one run, in tokens of its training; `forward` is for scoring one token.

    `reads_once`: what rows of a batch begin with goes through the model once for them all.
    """

    forward: float
    process: float
    step: float
    allowed: float
    reads_once: bool = False

    @classmethod
    def of(cls, prepared: Prepared) -> "Prices":
        """Those of a run as it is planned."""
        plan, rows = prepared.plan, prepared.training_rows
        training = plan.config.training
        sequences = len(sequences_of(rows, seed=training.seed, pack_length=pack_length(plan)))
        steps = steps_per_epoch(sequences, batch_of_all(plan), training.gradient_accumulation_steps)
        step = _tokens(rows) / steps
        # Two operations a weight to go forward, two to go back, and two more where the weights themselves are trained.
        operations = prepared.shape.parameters * (4 if prepared.target else 6)
        return cls(
            forward=1 / 2 if prepared.target else 1 / 3,
            process=_PROCESS / operations,
            step=step,
            allowed=max(plan.config.judge.budget * step * prepared.total_steps, FREE / operations),
            reads_once=ABILITIES[plan.config.backend].reads_once,
        )

    def scoring(self, rows: Iterable[TokenizedRow | Batch]) -> float:
        """The loss of each row or batch."""
        return self.forward * sum(len(row.ids) if isinstance(row, TokenizedRow) else self._read(row) for row in rows)

    def _read(self, batch: Batch) -> int:
        """How many tokens of a batch go through the model."""
        return batch.token_count - (shared_start(batch) * (len(batch.rows) - 1) if self.reads_once else 0)

    def reference(self, prepared: Prepared) -> float:
        """Log p of all pairs that are trained, once: what their preferences are measured from."""
        return self.forward * _tokens(prepared.training_rows)

    def answering(self, prompts: Sequence[Sequence[int]], most: int) -> float:
        """Answers of up to so many tokens; only prompts of one length are asked together."""
        alike = Counter(map(len, prompts)).items()
        return self.forward * sum(length * count + most * (_STEP + _WORD * count) for length, count in alike)

    def asking(self, prepared: Prepared, questions: Sequence[Question]) -> float:
        """Answers to these questions."""
        return self.answering([each.ids for each in questions], prepared.plan.config.evaluation.max_new_tokens)

    def memory(self, prepared: Prepared) -> float:
        """A few steps of LoRA and of full fine-tuning, each in a process of its own; 0 where they cannot be."""
        config = prepared.plan.config
        able = prepared.target is not None and not prepared.shape.quantized and ABILITIES[config.backend].memory
        tokens = _MEMORY_STEPS * config.judge.memory_batch_size * config.judge.memory_length
        return 2 * self.process + (1 + _FULL_STEP) * tokens if able and config.judge.memory != "never" else 0.0


def _tokens(rows: Sequence[TokenizedRow]) -> int:
    """Of both sides where rows are pairs; rows that lie in a file are not read for it."""
    return int(sizes_of(rows)[:, 0].sum())


@dataclass(frozen=True, slots=True)
class Budget:
    """What judging may cost, what its parts are expected to, and what is left for the control; in training tokens.

    `steps` of `step` tokens each are the training. `looks` is the price of both looks and of the check in a fresh
    process, `control_look` that of asking two models the trained questions.
    """

    share: float
    steps: int
    step: float
    allowed: float
    looks: float
    memory: float
    control_look: float

    @property
    def memory_fits(self) -> bool:
        """Whether the memory measurement fits beside the looks."""
        return self.looks + self.memory <= self.allowed

    @property
    def left(self) -> float:
        """What looks, and the memory measurement where it fits, leave."""
        return max(0.0, self.allowed - self.looks - (self.memory if self.memory_fits else 0.0))

    @property
    def control_steps(self) -> int:
        """How many steps of the shuffled-label control fit into what is left."""
        return max(0, min(self.steps, int((self.left - self.control_look) / self.step)))

    def control(self, steps: int) -> float:
        """The price of a control of so many steps."""
        return steps * self.step + self.control_look

    def too_dear(self, price: float) -> str:
        """Why something is not done: its price as a share of the training, which is the same on every machine."""
        training = self.steps * self.step
        return (
            f"it would cost {price / training:.1%} of what the training does: judging may cost "
            f"{self.allowed / training:.1%} (judge.budget), and {self.left / training:.1%} are left"
        )

    def told(self) -> dict[str, Any]:
        """All of it for the record."""
        counts = {name: round(value, 3) for name, value in asdict(self).items()}
        return {**counts, "memory_fits": self.memory_fits, "control_steps": self.control_steps}
