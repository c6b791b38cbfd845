"""The registry of adapter kinds: each is one file here, and its name in `ADAPTER_KINDS`."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from finetune.adapters.kind import AdapterKind, AdapterTensor
from finetune.adapters.kinds.dora import DoRA
from finetune.adapters.kinds.ia3 import IA3
from finetune.adapters.kinds.lora import LoRA
from finetune.records import AdapterTarget, Optimization

ADAPTER_KINDS: Mapping[str, AdapterKind] = {kind.name: kind for kind in (LoRA(), DoRA(), IA3())}
_TENSORS = tuple(dict.fromkeys(tensor for kind in ADAPTER_KINDS.values() for tensor in kind.tensors))


class LayerTensor(NamedTuple):
    """A tensor of an adapter, and the path of the layer that it belongs to."""

    path: str
    tensor: AdapterTensor


def kind_of(target: AdapterTarget) -> AdapterKind:
    """The kind of an adapter."""
    return ADAPTER_KINDS[target.kind]


def any_of(names: Iterable[str] = ADAPTER_KINDS) -> str:
    """The names of kinds, for a hint: "lora, dora or ia3"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def titles(kinds: Iterable[AdapterKind] = ADAPTER_KINDS.values()) -> str:
    """Kinds as people call them: "LoRA, DoRA and IA3"."""
    *others, last = [kind.title for kind in kinds]
    return f"{', '.join(others)} and {last}" if others else last


@lru_cache(maxsize=1 << 14)
def layer_tensor(name: str) -> LayerTensor | None:
    """What a tensor's name, in a PEFT model or in PEFT's file, speaks of; None for one that no kind of adapter has."""
    for tensor in _TENSORS:
        for ending in (tensor.in_memory, tensor.on_disk):
            if name.endswith(f".{ending}"):
                return LayerTensor(name.removesuffix(f".{ending}").removeprefix("base_model.model."), tensor)
    return None


def kind_of_tensors(keys: Iterable[str]) -> AdapterKind:
    """The kind whose tensors these are, by their keys.

    Raises:
        LookupError: no kind has just these.
    """
    by_keys = {frozenset(tensor.key for tensor in kind.tensors): kind for kind in ADAPTER_KINDS.values()}
    return by_keys[frozenset(keys)]


def lr_ratio_and_decay(optimization: Optimization, name: str, dimensions: int) -> tuple[float, float]:
    """What the learning rate of a trained tensor is multiplied with, and its weight decay.

    What is no adapter's, trained whole, is judged by its shape: gains and biases are fast and do not decay.
    """
    found = layer_tensor(name)
    fast, decays = (found.tensor.fast, found.tensor.decays) if found else (dimensions == 1, dimensions > 1)
    return optimization.lr_ratio_of(fast=fast), optimization.decay_of(decays=decays)
