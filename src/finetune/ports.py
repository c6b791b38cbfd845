"""The sockets: what a backend, a tokenizer and an event consumer must offer. Rooms know these and never each other."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune.abilities import Abilities
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization, Quantization

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Tokenizer(Protocol):
    """Text to ids and back; markup may hold control tokens, content never does."""

    bos_id: int | None
    eos_id: int
    pad_id: int
    adds_bos: bool

    def encode_markup(self, text: str) -> list[int]:
        """Ids of template text: control tokens in it become their ids."""

    def encode_content(self, text: str) -> list[int]:
        """Ids of somebody's text: what looks like a control token stays ordinary text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, control tokens left out."""

    def control_id(self, token: str) -> int | None:
        """The id of a control token, or None when the tokenizer has no such token."""


class Objective(Protocol):
    """What a step minimises, as a function of its targets' losses; a backend knows no more of it than this.

    The loss of a target t is (1 - s) x -log p(t) + s x the mean of -log p over all words, where s is `label_smoothing`.
    """

    @property
    def label_smoothing(self) -> float:
        """The share of a target that is spread over all words, from 0 to 1."""

    @property
    def summed(self) -> bool:
        """Whether a batch's loss is the plain sum of its targets' losses: then a backend may take it in one go."""

    def units(self, batch: Batch) -> int:
        """How many things, such as tokens, a batch's loss is a sum over; a step divides by those of all its batches."""

    def total(self, batch: Batch, losses: "NDArray[np.float64]") -> "tuple[float, NDArray[np.float64]]":
        """A batch's loss and its slope along each target's loss.

        Args:
            losses: those of the targets, (n,) in nats, row after row.
        """


class Group(Protocol):
    """The processes that train one model together, as one of them sees them: it is number `rank` of `size`.

    Every process must ask for the same sums in the same order. An error that ends one process ends them all.
    """

    rank: int
    size: int
    in_step: bool
    """Whether every process must go through the model as often as any other, as where they share its weights."""

    def total(self, value: float) -> float:
        """The sum of one number over all processes, in double precision; the same in each."""

    def sum(self, tensor: object) -> Any:
        """The sum of a tensor of the backend's own kind over all processes; the same in each."""

    def divide(self, session: "Session") -> None:
        """Let the processes share the weights that are not trained, where the launcher was told so."""

    def restore(self, session: "Session") -> None:
        """Give the first process all weights again, once the others have gone."""


class ChooseTokens(Protocol):
    """How an answer goes on, where that is not the likeliest token."""

    def __call__(self, logits: "NDArray[Any]") -> "NDArray[np.int64]":
        """The next token of each answer, (answers,), from its logits, (answers, vocabulary)."""


class Session(Protocol):
    """A loaded model that can be trained, scored, asked and saved: the verbs in which backends differ."""

    @property
    def device(self) -> str:
        """Where the model computes: "cpu", or a GPU by its name."""

    def attach(self, target: AdapterTarget | None, seed: int) -> None:
        """Put a freshly initialised adapter on the model and freeze the rest; None makes every weight trainable."""

    def prepare_updates(self, optimization: Optimization) -> None:
        """Make the optimizer for everything that is trainable."""

    def accumulate(self, batch: Batch, weight: float, objective: Objective = ...) -> float:
        """Add `weight` x (the objective's loss of the batch) to the gradients; returns that loss.

        Args:
            objective: cross-entropy where none is given: the sum of the targets' losses in nats.
        """

    def pool_gradients(self, group: Group) -> None:
        """Add up the gradients of all processes of a group: afterwards each has the sum."""

    def reseed(self, seed: int) -> None:
        """Draw the random numbers of training from this seed from now on."""

    def clip_gradients(self) -> float:
        """Clip all gradients together to the limit; returns their L2 norm before clipping."""

    def update(self, learning_rate: float) -> None:
        """Step the optimizer and clear the gradients."""

    def loss(self, batch: Batch, objective: Objective = ...) -> float:
        """The objective's loss of the batch, dropout off; mode and random state are left as they were."""

    def scaled(self, name: str, factor: float) -> AbstractContextManager[None]:
        """Within this context a weight of the base, by its name in the model's files, is `factor` times what it is."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        choose: ChooseTokens | None = None,
    ) -> list[list[int]]:
        """Continuations without the prompt and without the stop token, in the order of `prompts`.

        Args:
            choose: chooses each token; greedy where none is given.
        """

    def save_logits(self, prompts: Sequence[Sequence[int]], path: Path) -> None:
        """Write the logits after each token of each prompt, (tokens, vocabulary) in float32, keyed "0", "1", ..."""

    def logits_in_other_precision(self, prompts: Sequence[Sequence[int]]) -> "list[NDArray[np.float64]]":
        """What `save_logits` writes, the same weights computed in float64; in float32 where the session is float64.

        What differs is rounding, and nothing else.
        """

    def adapter_disabled(self) -> AbstractContextManager[None]:
        """Within this context the model answers as its base would."""

    def fingerprints(self) -> dict[str, str]:
        """A hash of each parameter tensor by name, base and adapter."""

    def trainable_names(self) -> list[str]:
        """Names of the tensors that training may change."""

    def gradient_norms(self) -> dict[str, float]:
        """The L2 norm of each trainable tensor's gradient, as accumulated so far."""

    def check_saving(self) -> None:
        """Refuse now what `save_model` could only refuse in the end."""

    def save_model(self, folder: Path) -> None:
        """Write the whole model, its adapter merged into it and weights in safetensors, into an existing folder."""

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT's own format into an existing empty folder."""

    def load_adapter(self, folder: Path) -> None:
        """Put a saved adapter on the model; every tensor must match."""

    def start_from(self, folder: Path) -> None:
        """Give the attached adapter, which stays trainable, the weights that are saved in PEFT's format in a folder."""

    def save_state(self, folder: Path) -> None:
        """Write adapter, optimizer and random state so that `load_state` continues bit for bit."""

    def load_state(self, folder: Path) -> None:
        """Restore what `save_state` wrote."""


class Backend(Protocol):
    """A framework that can train: it makes and opens models."""

    name: str
    abilities: Abilities

    def versions(self) -> dict[str, str]:
        """Name and version of each library that computes."""

    def join(self) -> Group:
        """The processes that a launcher has started together with this one; a group of one where none has."""

    def create(self, config: Mapping[str, object], folder: Path, seed: int) -> None:
        """Write a model of random weights and the given transformers config into an existing folder."""

    def open(
        self,
        location: ModelLocation,
        dtype: str,
        pad_id: int,
        *,
        quantize: Quantization | None = None,
        device: str = "auto",
    ) -> Session:
        """Load a model's weights, quantised where that is asked for, ready to attach an adapter to.

        Args:
            device: "cpu", "gpu", or "auto" for a GPU where there is one.
        """
