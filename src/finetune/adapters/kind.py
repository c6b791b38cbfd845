"""What a kind of adapter must say of itself; everything else in the house asks it here, and none by its name.

The arithmetic is written once for every array library: `xp` is NumPy for the reference backend and for merging, and
`mlx.core` for MLX, which makes the gradient itself; torch takes PEFT's own layer. Shapes: t tokens, `inputs` and
`outputs` of the layer that an adapter sits on; a layer's weight is (outputs, inputs) however it is stored.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from finetune.records import AdapterTarget

Shape = tuple[int, ...]
Parts = Mapping[str, Any]
"""The arrays of one layer's adapter, of whichever library, by their keys."""
F32 = 4
"""Bytes of a number of an adapter: it is trained in float32 at least, whatever the base is stored as."""


@dataclass(frozen=True, slots=True)
class AdapterTensor:
    """One tensor of a layer's adapter.

    `in_memory` and `on_disk` follow the layer's path in a PEFT model and in PEFT's file. `fast` ones move
    `loraplus_lr_ratio` times faster, and weight decay pulls on those that it `decays`. At the very first step the
    gradient is `zero` for certain, or `some` for certain.
    """

    key: str
    in_memory: str
    on_disk: str
    fast: bool = False
    decays: bool = True
    first_gradient: Literal["zero", "some", "any"] = "any"


@dataclass(frozen=True, slots=True)
class LayerPass:
    """One pass through a layer that has an adapter.

    `x` (t, inputs) is what the layer reads, and `kept` what dropout leaves of it for the adapter, in its own precision;
    `keep` is None where nothing is dropped, else what `x` was multiplied with. `base` is the layer without its adapter.
    """

    x: Any
    kept: Any
    keep: Any
    base: Callable[[Any], Any]
    weight: Callable[[], Any]
    bias: Any
    scale: float


@dataclass(frozen=True, slots=True)
class Readers:
    """Adapted layers that read one tensor, `width` numbers a token, in a step with torch.

    `layers` tells of each its name, its rank and how many numbers it writes for a token; `size` is the bytes of the
    model's own numbers; `alive`: what they read is kept by another anyway.
    """

    width: int
    layers: tuple[tuple[str, int, int], ...]
    size: int
    dropped: bool
    alive: bool


class AdapterKind(ABC):
    """One kind of adapter. Whoever adds one writes such a class in `kinds/` and names it there, in `KINDS`."""

    name: ClassVar[str]
    title: ClassVar[str]
    """What people call it."""
    about: ClassVar[str]
    """What is trained, in words that follow "What is trained: "."""
    settings: ClassVar[frozenset[str]] = frozenset()
    """Which settings of `adapter` it takes beside kind, target_modules and modules_to_save; any other is refused."""
    tensors: ClassVar[tuple[AdapterTensor, ...]]
    low_rank: ClassVar[bool] = False
    """Whether scale x B A is all that it adds to a weight, so that it folds into one and fits into GGUF."""
    token_rows: ClassVar[bool] = False
    """Whether PEFT trains single rows of the embedding beside it, for new tokens."""
    learning_rate_factor: ClassVar[float] = 1.0
    """How many times LoRA's learning rate it takes, where none is set."""
    peft_type: ClassVar[str]
    peft_config: ClassVar[str]
    """PEFT's own class of settings."""
    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Values of PEFT's settings that change nothing about a saved adapter."""
    mlx_lm_layer: ClassVar[str] = ""
    """mlx-lm's own layer, as module:class; empty where it has none."""
    mlx_lm_names: ClassVar[Mapping[str, str]] = {}
    """What mlx-lm's files call each tensor."""

    def takes(self, key: str) -> bool:
        """Whether a setting, by its dotted key, means anything to this kind."""
        if key == "training.loraplus_lr_ratio":
            return any(tensor.fast for tensor in self.tensors)
        return key.removeprefix("adapter.") in {"kind", "target_modules", "modules_to_save", *self.settings}

    @abstractmethod
    def shapes(self, target: AdapterTarget, path: str, outputs: int, inputs: int) -> dict[str, Shape]:
        """The shape of each tensor of one layer, by its key."""

    @abstractmethod
    def start(
        self, xp: Any, shapes: Mapping[str, Shape], uniform: Callable[[float, Shape], Any], weight: Callable[[], Any]
    ) -> dict[str, Any]:
        """A fresh adapter of one layer, with which the layer computes what it did.

        Args:
            uniform: draws numbers between minus a bound and that bound, of a shape.
        """

    @abstractmethod
    def forward(self, xp: Any, parts: Parts, seen: LayerPass) -> tuple[Any, tuple[Any, ...]]:
        """What the layer writes (t, outputs), and what `backward` needs of this pass."""

    @abstractmethod
    def backward(self, parts: Parts, seen: LayerPass, saved: tuple[Any, ...], dy: Any) -> tuple[dict[str, Any], Any]:
        """The gradient of each tensor and that of x (t, inputs), from that of the output, worked out by hand."""

    @abstractmethod
    def merged(self, xp: Any, parts: Parts, scale: float, weight: Any) -> Any:
        """The weight of a layer without an adapter that computes the same."""

    def merged_bias(self, parts: Parts, bias: Any) -> Any:
        """The bias of a layer without an adapter that computes the same."""
        del parts
        return bias

    @abstractmethod
    def write_peft(self, target: AdapterTarget) -> dict[str, Any]:
        """PEFT's settings of this kind, for its file and for its class, beside those that all kinds have."""

    def fits_peft(self, settings: Mapping[str, Any]) -> bool:
        """Whether PEFT's settings are those of an adapter of this kind."""
        return bool(settings.get("peft_type") == self.peft_type)

    @abstractmethod
    def read_peft(self, settings: Mapping[str, Any], modules: tuple[str, ...]) -> AdapterTarget:
        """The adapter on `modules` that these settings of PEFT's speak of.

        Raises:
            KeyError, TypeError, ValueError: they are incomplete, or what they say cannot be done here.
        """

    @abstractmethod
    def kept_by_torch(self, readers: Readers) -> int:
        """Bytes for each token that waits for the backward pass, where torch with PEFT's layer computes."""

    def copies_weight(self, *, size: int, dropped: bool) -> bool:
        """Whether torch keeps a copy of each adapted weight in float32 for the backward pass."""
        del size, dropped
        return False

    def brief_by_torch(self, outputs: int, inputs: int) -> int:
        """Bytes that torch takes for a moment to look at one layer's weight."""
        del outputs, inputs
        return 0

    @abstractmethod
    def kept_by_reference(self, name: str, outputs: int, inputs: int, rank: int) -> int:
        """Numbers for each token that `forward` leaves for `backward`, beside a mask of dropout."""


def switch(settings: Mapping[str, Any], key: str) -> bool:
    """A setting that is true, false or absent.

    Raises:
        TypeError: it is something else.
    """
    if settings.get(key) not in (None, False, True):
        raise TypeError(f"{key} is neither true nor false")
    return bool(settings.get(key))


def read_rows(value: Any) -> dict[str, tuple[int, ...]]:
    """PEFT's `trainable_token_indices`: which rows of which tables are trained; a list alone is the embedding's.

    Raises:
        TypeError, ValueError: it is neither, or numbers a row twice.
    """
    if isinstance(value, list):
        value = {"embed_tokens": value}
    for rows in value.values():
        if not all(type(row) is int and row >= 0 for row in rows) or len(set(rows)) < len(rows):
            raise ValueError("trainable_token_indices are no rows of a table")
    return {str(path): tuple(rows) for path, rows in value.items()}
