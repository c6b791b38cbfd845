"""What was measured of one run, for the judges; None means that it was not measured, and `why` says why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from finetune.config import Goal
from finetune.records import DEFAULT_KIND, Reload, Scores

Looked = TypeVar("Looked")
"""What is compared with a control: answers to questions, or the gains of pairs."""
FEWEST_PAIRS = 16
"""From so many unseen pairs on the outcome depends on them."""


@dataclass(frozen=True, slots=True)
class MemoryMeasure:
    """What one fresh process measured while it trained a few steps; all in bytes."""

    method: Literal["lora", "full"]
    batch_size: int
    length: int
    dtype: str
    steps: int
    framework_rss: int
    peak_rss: int
    peak_tensors: int
    gradient_bytes: int
    optimizer_bytes: int
    weight_bytes: int

    @property
    def rss_above_framework(self) -> int:
        """The peak resident set less what the framework alone took."""
        return self.peak_rss - self.framework_rss


@dataclass(frozen=True, slots=True)
class LossEvidence:
    """Losses in nats per trained token. `fixed`: the same training batches before and after, dropout off.

    `held_out` is that of so many held-out rows; so many others (`held_out_trained`) are not judged by, since they
    stand in training rows. `held_out_near` of those judged by are nearly as a training row.
    """

    per_step: tuple[float, ...]
    fixed_before: float
    fixed_after: float
    vocab_size: int
    held_out_before: float | None = None
    held_out_after: float | None = None
    held_out_rows: int = 0
    held_out_trained: int = 0
    held_out_near: int = 0


@dataclass(frozen=True, slots=True)
class ControlEvidence(Generic[Looked]):
    """What is `found` of a model trained on shuffled answers, or on flipped pairs, for so many steps.

    `tuned` is the same of the tuned model after as many steps, where the run went on; None where it ended there.
    """

    found: Looked
    steps: int = 0
    tuned: Looked | None = None


@dataclass(frozen=True, slots=True)
class LearningEvidence:
    """Answers to the trained questions by base, tuned and control model, and to questions the base already knew.

    `retention_trained`: how many of the latter stand in training rows, and were not asked. `retention_near`: how
    many are nearly as a training row.
    """

    base: Scores
    tuned: Scores
    control: ControlEvidence[Scores] | None = None
    retention_base: Scores | None = None
    retention_tuned: Scores | None = None
    retention_trained: int = 0
    retention_near: int = 0


@dataclass(frozen=True, slots=True)
class Paired:
    """One number a row of the base and of the tuned model, in the same order, in nats per token."""

    base: tuple[float, ...]
    tuned: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class MatchingEvidence:
    """For each row, whether its own answer is the likeliest of so many `choices`, by base and by tuned model."""

    base: tuple[bool, ...]
    tuned: tuple[bool, ...]
    choices: int


@dataclass(frozen=True, slots=True)
class OpenEvidence:
    """What shows learning and harm where an answer has no single right wording.

    `losses` and `unseen` are losses of trained and of unseen rows; `text` and `own_answers` those of neutral
    paragraphs and of the base's own answers to neutral prompts. `right`: which neutral questions base and tuned model
    answer. `ended`, `copied`: of the answers to unseen prompts, which end by themselves and which share is copied.
    """

    goal: Goal
    rows: MatchingEvidence | None
    losses: Paired
    unseen: Paired
    association: MatchingEvidence | None
    text: Paired
    own_answers: Paired
    right: tuple[tuple[bool, ...], tuple[bool, ...]]
    ended: tuple[bool, ...]
    copied: tuple[float, ...]
    longest: int
    uniform: float
    """The loss of a guess that holds all words for equally likely."""


@dataclass(frozen=True, slots=True)
class PreferenceEvidence:
    """By how many nats chosen gained on rejected since step 0, in training pairs (`rows`) and in `unseen` ones.

    `liked`: of the unseen pairs, whether the chosen answer is the likelier one, at step 0 and now. `chosen`: the loss
    of chosen answers alone, of both kinds of pairs, at step 0 and now. `control`: the gains of the `compared` pairs in
    a model that was trained on the same pairs with chosen and rejected changed round.
    """

    beta: float
    rows: tuple[float, ...]
    unseen: tuple[float, ...]
    liked: tuple[tuple[bool, ...], ...]
    chosen: Paired
    control: ControlEvidence[tuple[float, ...]] | None = None
    why_no_control: str = ""

    @property
    def compared(self) -> tuple[float, ...]:
        """The gains to hold against a control's: those of unseen pairs, or of trained ones where those are few."""
        return self.unseen if len(self.unseen) >= FEWEST_PAIRS else self.rows


@dataclass(frozen=True, slots=True)
class MemoryEvidence:
    """LoRA and full fine-tuning, each measured in a process of its own at the same sizes."""

    lora: MemoryMeasure
    full: MemoryMeasure


@dataclass(frozen=True, slots=True)
class ParameterEvidence:
    """Fingerprints of every tensor before and after, and the first step's gradients; `kind` says what is trained."""

    before: Mapping[str, str]
    after: Mapping[str, str]
    declared: tuple[str, ...]
    first_gradients: Mapping[str, float]
    steps: int
    kind: str = DEFAULT_KIND


@dataclass(frozen=True, slots=True)
class ArtifactEvidence:
    """Sizes of the files that were written, what a fresh process made of them, and files nobody refers to."""

    files: Mapping[str, int]
    reload: Reload | None
    stray: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that was measured. `why` tells for a missing part (its field name) why it is missing; `unable` names parts
    that the backend has no means to measure.
    """

    loss: LossEvidence
    parameters: ParameterEvidence | None = None
    artifacts: ArtifactEvidence | None = None
    learning: LearningEvidence | None = None
    memory: MemoryEvidence | None = None
    open: OpenEvidence | None = None
    preference: PreferenceEvidence | None = None
    why: Mapping[str, str] = field(default_factory=dict)
    unable: frozenset[str] = frozenset()
