"""The frozen values that flow from room to room: Row, Conversation, Rendered, TokenizedRow, Batch, ... Verdict."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NO_LIMIT = 2**31 - 1
"""The context length of a model that states none, such as one that knows no positions."""
DEFAULT_KIND = "lora"  # of adapter where none is named; `adapters/kinds` holds them all
Scaling = Literal["standard", "rank_stabilized"]
T = TypeVar("T")


class Outcome(StrEnum):
    """How a law, a criterion or a comparison came out; JSON and text hold the plain word."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    NOT_APPLICABLE = "not applicable"
    ERROR = "error"

    @classmethod
    def of(cls, passed: object) -> "Outcome":
        """PASSED or FAILED."""
        return cls.PASSED if passed else cls.FAILED

    @classmethod
    def worst(cls, outcomes: Iterable["Outcome"]) -> "Outcome | None":
        """The worst of several: NOT_APPLICABLE only when all are, None when there are none."""
        given = set(outcomes)
        ranked = (cls.FAILED, cls.ERROR, cls.INCONCLUSIVE, cls.PASSED, cls.NOT_APPLICABLE)
        return next((outcome for outcome in ranked if outcome in given), None)


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data file as it was read, with the place it came from (`file:line` or `file[index]`)."""

    values: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of system, user, input, assistant or tool; `more`: its thought, calls and the like, as a JSON object.

    `trained`: whether its row says that it is learned or that it is not; None where the run's settings decide.
    """

    role: str
    content: str
    more: str = ""
    trained: bool | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that end with an answer when they are to be trained on; `tools` and `variables` are JSON.

    `from_text`: they are columns of text, which may hold a template already. `rejected`: what the last is preferred to.
    """

    messages: tuple[Message, ...]
    where: str
    tools: str = ""
    variables: str = ""
    from_text: bool = False
    rejected: Message | None = None

    @property
    def answer(self) -> str:
        """The last assistant turn: its text, and what it has beside it."""
        return self.messages[-1].content + self.messages[-1].more

    @property
    def prompt(self) -> "Conversation":
        """The same conversation without its last turn."""
        return replace(self, messages=self.messages[:-1], rejected=None)


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text, trained on from the first token to the end-of-text token."""

    text: str
    where: str


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of rendered text. `control`: control tokens in it are meant. `trained`: the model learns to say it."""

    text: str
    role: str
    trained: bool
    control: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as text, in segments; the loss mask is read off them and never recovered by searching."""

    segments: tuple[Segment, ...]
    where: str

    @property
    def text(self) -> str:
        """The whole rendered text."""
        return "".join(segment.text for segment in self.segments)


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """Token ids with one *trained* mark each; equal lengths. `rejected`: the other side, where the row is a pair."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    where: str
    rejected: "TokenizedRow | None" = None

    @property
    def target_count(self) -> int:
        """How many tokens carry loss: the first token of a row is never a target, nothing precedes it."""
        return sum(self.trained[1:])


@dataclass(frozen=True, slots=True)
class BatchArrays:
    """A batch in NumPy, padded on the right; n counts its targets, sequence by sequence.

    ids, positions: (sequences, length); positions count in each row, 0 for padding. targets: (n,), the ids to predict.
    here: where their logits are, one place before each. starts: where the row of each token, and of padding, begins.
    """

    ids: "NDArray[np.int64]"
    targets: "NDArray[np.int64]"
    here: "NDArray[np.bool_]"
    starts: "NDArray[np.int64]"
    positions: "NDArray[np.int64]"


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that go through the model together.

    `packed` says how many rows share each sequence, in order; without it each row has a sequence of its own. Rows
    that share a sequence never see each other: each is attended to, and counted in positions, as if it were alone.
    """

    rows: tuple[TokenizedRow, ...]
    packed: tuple[int, ...] = ()

    @property
    def sequences(self) -> tuple[tuple[TokenizedRow, ...], ...]:
        """The rows of each sequence."""
        if not self.packed:
            return tuple((row,) for row in self.rows)
        rows = iter(self.rows)
        return tuple(tuple(islice(rows, count)) for count in self.packed)

    def shard(self, shares: int) -> tuple["Batch", ...]:
        """The batch in so many shares, its sequences dealt out in turn like cards; a share may be empty."""
        hands = [self.sequences[number::shares] for number in range(shares)]
        sizes = [tuple(map(len, hand)) if self.packed else () for hand in hands]
        return tuple(Batch(tuple(chain(*hand)), size) for hand, size in zip(hands, sizes, strict=True))

    def arrays(self, pad_id: int) -> BatchArrays:
        """The batch as every backend takes it; padding stands at the end, where no token of a causal model looks."""
        import numpy as np

        lengths = [sum(len(row.ids) for row in sequence) for sequence in self.sequences]
        ids = np.full((len(lengths), max(lengths)), pad_id, np.int64)
        here, starts, positions = np.zeros(ids.shape, np.bool_), np.zeros_like(ids), np.zeros_like(ids)
        for index, sequence in enumerate(self.sequences):
            end = 0
            for row in sequence:
                start, end = end, end + len(row.ids)
                ids[index, start:end] = row.ids
                # The first token of a row is no target: what stands before it is another row's.
                here[index, start : end - 1] = row.trained[1:]
                starts[index, start:] = start
                positions[index, start:end] = np.arange(len(row.ids))
        return BatchArrays(ids, ids[:, 1:][here[:, :-1]], here, starts, positions)

    @property
    def target_count(self) -> int:
        """How many tokens of the batch carry loss."""
        return sum(row.target_count for row in self.rows)

    @property
    def token_count(self) -> int:
        """How many real tokens the batch holds, padding not counted."""
        return sum(len(row.ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class ModelLocation:
    """Where a model's files lie, what it was asked for as, and how it was found."""

    name: str
    folder: Path
    source: Literal["shipped", "local", "hub"]


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a matrix is quantised: to so many bits, in groups of a row, by a scheme of `models.quantize`."""

    bits: int
    group_size: int
    scheme: str = "affine"


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A weight matrix an adapter can sit on; `inputs` x `outputs` may be stored in either order."""

    name: str
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a model's files say of its size, read without loading a weight; 0 is a size that they do not say.

    `heads` ask and `kv_heads` answer, each `head_dim` wide; dropouts are shares that the model itself switches off;
    `tied_head`: the embedding table is the output head, too; `quantized`: which modules' weights are packed.
    """

    architecture: str
    parameters: int
    vocab_size: int
    hidden_size: int
    layers: int
    context_length: int
    linear_layers: tuple[LinearLayer, ...]
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    tied_head: bool = False
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    quantized: Mapping[str, Quantization] = field(default_factory=dict)

    @property
    def transposed(self) -> bool:
        """Whether linear layers are stored inputs x outputs."""
        return self.architecture in ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel")


@dataclass(frozen=True, slots=True)
class AdapterTarget:
    """The adapter to attach to every linear layer whose path ends with one of `modules`.

    `scaling`: B A is multiplied with alpha / rank or alpha / sqrt(rank). The patterns give layers ranks or alphas of
    their own: expressions for a path or its end, the first counts. `saved`: modules trained whole; `rows`: of tables.
    """

    rank: int
    alpha: float
    dropout: float
    modules: tuple[str, ...]
    kind: str = DEFAULT_KIND
    scaling: Scaling = "standard"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """The last names of the paths that `modules` end: `q_proj` of a layer's whole path, too."""
        return frozenset(path.rpartition(".")[2] for path in self.modules)

    def adapts(self, path: str) -> bool:
        """Whether the layer at a path gets an adapter."""
        return any(path == name or path.endswith(f".{name}") for name in self.modules)

    def rank_of(self, path: str) -> int:
        """The rank of one layer's adapter."""
        return _first_fitting(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """The alpha of one layer's adapter."""
        return _first_fitting(self.alpha_pattern, path, self.alpha)

    def scale_of(self, path: str) -> float:
        """What B A of one layer is multiplied with."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (rank if self.scaling == "standard" else math.sqrt(rank))


def fits(pattern: str, path: str) -> bool:
    """Whether a regular expression fits a layer's path, or the end of it from a dot on, as PEFT has it."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _first_fitting(patterns: Mapping[str, T], path: str, otherwise: T) -> T:
    return next((of for pattern, of in patterns.items() if fits(pattern, path)), otherwise) if patterns else otherwise


@dataclass(frozen=True, slots=True)
class Optimization:
    """How weights move: AdamW's numbers, constant over the run; the learning rate comes with each step.

    `loraplus_lr_ratio` is how many times faster LoRA's B moves than A, and whatever else its kind calls `fast`.
    """

    weight_decay: float
    max_grad_norm: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    loraplus_lr_ratio: float = 1.0
    gradient_checkpointing: bool = False  # blocks are computed again for their gradients

    def lr_ratio_of(self, *, fast: bool) -> float:
        """What the learning rate is multiplied with (Hayou et al. 2024, arXiv:2402.12354; PEFT's LoRA+)."""
        return self.loraplus_lr_ratio if fast else 1.0

    def decay_of(self, *, decays: bool) -> float:
        """The weight decay of a trained tensor: matrices shrink, while gains, biases and magnitudes do not."""
        return self.weight_decay if decays else 0.0


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt as ids, with the text to show and the one answer that counts as right, as text and as ids."""

    ids: tuple[int, ...]
    text: str
    expected: str
    answer: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said to one question, next to the one answer that counts as right."""

    question: str
    expected: str
    given: str
    right: bool


@dataclass(frozen=True, slots=True)
class Scores:
    """Answers to one set of questions by one model."""

    answers: tuple[Answer, ...]

    @property
    def right(self) -> int:
        """How many answers are right."""
        return sum(answer.right for answer in self.answers)

    @property
    def share(self) -> float:
        """The share of right answers, 0 to 1."""
        return self.right / len(self.answers)


@dataclass(frozen=True, slots=True)
class Reload:
    """What a fresh process found when it loaded the saved adapter on a fresh base; differences of logits."""

    prompts: int
    largest_logit: float
    difference: float
    difference_from_base: float
    rounding: float  # the largest that rounding alone makes
    allowed: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's word on one criterion, always with the measured and the allowed value."""

    id: str
    title: str
    criterion: int
    outcome: Outcome
    measured: str
    allowed: str
    reason: str = ""
    companion: bool = False
    counts: bool = True  # whether the headline depends on it
    numbers: dict[str, float] = field(default_factory=dict)
