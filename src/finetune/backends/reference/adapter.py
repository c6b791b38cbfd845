"""A LoRA adapter and its files, in PEFT's own format.

Each adapted layer W (out x in) gets A (r x in) and B (out x r); its output grows by alpha / r x B A x. On disk both are
float32, which every reader of the format takes: a saved adapter is the session's own rounded once, by 6e-8 at most.

Source: Hu et al. 2021 (arXiv:2106.09685), and `LoraLayer` and `LoraConfig` of Hugging Face PEFT.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from finetune.backends.reference.weights import read_tensors
from finetune.errors import ModelError
from finetune.records import AdapterTarget

Array = NDArray[np.float64]
Layers = Mapping[str, tuple[int, int]]
"""(outputs, inputs) of each linear layer by its path."""
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_UNDERSTOOD = {"r", "lora_alpha", "lora_dropout", "target_modules", "peft_type"}
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "loftq_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
"""Settings that do not change what a saved adapter computes; any other must be switched off."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """The matrices (A, B) of each adapted layer by the layer's path; they are changed in place by training."""

    target: AdapterTarget
    pairs: dict[str, tuple[Array, Array]]

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.target.alpha / self.target.rank

    def tensors(self) -> dict[str, Array]:
        """Every matrix by its name in a PEFT model."""
        return {tensor_name(path, half): pair[half == "B"] for path, pair in self.pairs.items() for half in "AB"}


def tensor_name(path: str, half: str) -> str:
    """What PEFT calls the matrix `half`, A or B, of a layer's adapter."""
    return f"base_model.model.{path}.lora_{half}.default.weight"


def draw_adapter(layers: Layers, target: AdapterTarget, random: np.random.Generator) -> Adapter:
    """A fresh adapter: A uniform within 1 / sqrt(in), which is Kaiming's with a = sqrt(5), layer by layer; B zero.

    Raises:
        ModelError: a name in `target.modules` matches no linear layer.
    """
    pairs = {}
    for path in _adapted(layers, target.modules):
        outputs, inputs = layers[path]
        bound = 1 / math.sqrt(inputs)
        pairs[path] = random.uniform(-bound, bound, (target.rank, inputs)), np.zeros((outputs, target.rank))
    return Adapter(target, pairs)


def write_adapter(adapter: Adapter, base: str, folder: Path) -> None:
    """Write the adapter so that PEFT loads it; `base` is what its base model is to be found as."""
    settings = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapter.target.alpha,
        "lora_dropout": adapter.target.dropout,
        "peft_type": "LORA",
        "r": adapter.target.rank,
        "target_modules": list(adapter.target.modules),
        "task_type": "CAUSAL_LM",
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    tensors = {_on_disk(name): tensor.astype(np.float32) for name, tensor in adapter.tensors().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapter(layers: Layers, folder: Path) -> Adapter:
    """The adapter in `folder`, which PEFT or `write_adapter` wrote.

    Raises:
        ModelError: a file is missing or corrupt, the adapter is of a kind that is not plain LoRA, or a tensor is
            missing, unknown or of another shape.
    """
    target = _read_target(folder)
    expected = draw_adapter(layers, target, np.random.default_rng(0)).tensors()
    saved = read_tensors(folder / WEIGHTS, f"adapter {folder}")
    wrong = {_on_disk(name) for name in expected} ^ set(saved)
    wrong |= {
        _on_disk(name) for name, tensor in expected.items()
        if _on_disk(name) in saved and saved[_on_disk(name)].shape != tensor.shape
    }  # fmt: skip
    if wrong:
        raise ModelError(
            f"adapter {folder} does not fit this model: {len(wrong)} tensors are missing, unknown or of another shape, "
            f"first {min(wrong)}",
            hint="use the base model that the adapter was trained on",
        )
    paths = _adapted(layers, target.modules)
    halves = [[saved[_on_disk(tensor_name(path, half))] for half in "AB"] for path in paths]
    return Adapter(target, {path: (down, up) for path, (down, up) in zip(paths, halves, strict=True)})


def _read_target(folder: Path) -> AdapterTarget:
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        odd = {key: value for key, value in settings.items() if not _is_plain(key, value)}
        modules = tuple(settings["target_modules"])
        target = AdapterTarget(settings["r"], settings["lora_alpha"], settings.get("lora_dropout", 0.0), modules)
        sound = (
            type(target.rank) is int and target.rank > 0
            and type(target.alpha) in (int, float) and 0 < target.alpha < math.inf
            and type(target.dropout) in (int, float) and 0 <= target.dropout < 1
            and isinstance(settings["target_modules"], list) and all(isinstance(name, str) for name in modules)
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"adapter {folder} has no usable {SETTINGS}: {error}") from None
    if not sound:
        raise ModelError(f"adapter {folder} has no usable {SETTINGS}: a setting is of the wrong kind")
    if odd:
        key = min(odd)
        raise ModelError(
            f"adapter {folder} sets {key} to {odd[key]!r}; the reference backend does plain LoRA only",
            hint="use the torch backend for this adapter",
        )
    return target


def _is_plain(key: str, value: Any) -> bool:
    if key == "peft_type":
        return bool(value == "LORA")
    if key == "init_lora_weights":
        return value in (None, True, False, "gaussian")
    return key in _UNDERSTOOD | _WITHOUT_EFFECT or not value or (key, value) == ("bias", "none")


def _adapted(layers: Layers, modules: Iterable[str]) -> list[str]:
    """The paths of the layers meant, in the model's order; as in PEFT a name means every path that ends with it."""
    modules = tuple(modules)
    hit = [path for path in layers if any(path == name or path.endswith(f".{name}") for name in modules)]
    for name in modules:
        if not any(path == name or path.endswith(f".{name}") for path in hit):
            raise ModelError(
                f"the adapter's target {name!r} matches no linear layer of this model",
                hint=f"choose from: {', '.join(dict.fromkeys(path.rsplit('.', 1)[-1] for path in layers))}",
            )
    return hit


def _on_disk(name: str) -> str:
    return name.replace(".default.", ".")
