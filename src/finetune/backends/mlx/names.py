"""What a weight is called: mlx-lm names it by its place in its own model, files and adapters by transformers' place.

For most models the two are one. mlx-lm keeps GPT-2 below `model.`, and its matrices outputs x inputs, while
transformers keeps it below `transformer.`, and its matrices the other way round.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import mlx.core as mx

from finetune.errors import ModelError

_PREFIXES = {"gpt2": ("model.", "transformer.")}
_TRANSPOSED = {"gpt2": ("c_attn.weight", "c_proj.weight", "c_fc.weight")}


@dataclass(frozen=True, slots=True)
class WeightNames:
    """The names of one model's weights; `filed` are those that its files use."""

    model_type: str
    filed: frozenset[str]

    @property
    def transposed(self) -> bool:
        """Whether the linear layers' weights are stored inputs x outputs."""
        return self.model_type in _TRANSPOSED

    def shown(self, name: str) -> str:
        """What transformers calls the weight, or the layer, that mlx-lm calls `name`."""
        ours, theirs = _PREFIXES.get(self.model_type, ("", ""))
        return theirs + name[len(ours) :] if ours and name.startswith(ours) else name

    def refuse_foreign(self, names: Collection[str], what: str) -> None:
        """Refuse to write weights under names that mlx-lm alone knows; `names` are those shown.

        Raises:
            ModelError: the model's files name at least one of them otherwise, or hold it in another form.
        """
        _, theirs = _PREFIXES.get(self.model_type, ("", ""))
        foreign = [name for name in names if name not in self.filed and name.removeprefix(theirs) not in self.filed]
        if foreign:
            raise ModelError(
                f"mlx-lm keeps {len(foreign)} weights of this {self.model_type} in another form than its files, first "
                f"{min(foreign)}: {what} would fit nothing else",
                hint="use the torch backend for this model",
            )

    def to_files(self, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Weights by mlx-lm's names as transformers has them."""
        return {self.shown(name): self.turn(name, tensor) for name, tensor in tensors.items()}

    def turn(self, name: str, tensor: mx.array) -> mx.array:
        """A weight of mlx-lm's as files hold it, and the other way round."""
        transposed = _TRANSPOSED.get(self.model_type, ())
        return tensor.T if transposed and name.endswith(transposed) else tensor


def for_mlx_lm(model_type: str, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Weights as files name them, as mlx-lm's own reader takes them: without what is no weight of its own."""
    _, theirs = _PREFIXES.get(model_type, ("", ""))
    return {
        name.removeprefix(theirs): tensor
        for name, tensor in weights.items()
        if not name.endswith((".masked_bias", ".inv_freq")) and not (name.endswith(".bias") and tensor.ndim == 4)
    }
