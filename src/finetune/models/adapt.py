"""Chooses the layers an adapter sits on, and refuses what cannot be adapted before anything is loaded."""

from collections.abc import Sequence

from finetune.errors import ModelError
from finetune.records import AdapterTarget, ModelShape


def choose_layers(shape: ModelShape, targets: str | Sequence[str]) -> tuple[str, ...]:
    """The short names of the layers to adapt, such as `q_proj`: all linear layers, or those named.

    Raises:
        ModelError: a name matches no linear layer; the names that exist are listed.
    """
    existing = tuple(dict.fromkeys(layer.name.rsplit(".", 1)[-1] for layer in shape.linear_layers))
    if not existing:
        raise ModelError(f"{shape.architecture} has no linear layer that LoRA can adapt")
    if targets == "all-linear":
        return existing
    unknown = [name for name in targets if name not in existing]
    if unknown:
        raise ModelError(
            f"adapter.targets: {', '.join(map(repr, unknown))} matches no linear layer of {shape.architecture}",
            hint=f"choose from: {', '.join(existing)}",
        )
    return tuple(targets)


def check_rank(shape: ModelShape, target: AdapterTarget) -> None:
    """Refuse a rank above what a layer can hold.

    Raises:
        ModelError: the rank exceeds the smaller side of a targeted layer; the smallest such layer is named.
    """
    hit = [layer for layer in shape.linear_layers if layer.name.rsplit(".", 1)[-1] in target.modules]
    smallest = min(hit, key=lambda layer: min(layer.shape))
    if target.rank > min(smallest.shape):
        raise ModelError(
            f"adapter.rank {target.rank} is above the size of {smallest.name} ({smallest.shape[0]} x "
            f"{smallest.shape[1]})",
            hint=f"lower adapter.rank to at most {min(smallest.shape)}, or leave that layer out of adapter.targets",
        )
