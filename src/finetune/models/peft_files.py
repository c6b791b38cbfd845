"""An adapter's files in PEFT's own format: their names, their settings, and which layers they speak of.

Next to the tensors lies `adapter_config.json`. Of a layer at `path` the file holds A (rank x inputs) and B (outputs x
rank), named `base_model.model.<path>.lora_A.weight` and `...lora_B.weight`.

Source: `LoraConfig` and `get_peft_model_state_dict` of Hugging Face PEFT.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import ModelError
from finetune.records import AdapterTarget

Layers = Mapping[str, tuple[int, int]]
"""(outputs, inputs) of each linear layer by its path, whichever way round its weight is stored."""
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_UNDERSTOOD = {"r", "lora_alpha", "lora_dropout", "target_modules", "peft_type"}
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "loftq_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
"""Settings that do not change what a saved adapter computes; any other must be switched off."""


def adapted_layers(layers: Layers, modules: Iterable[str]) -> list[str]:
    """The paths of the layers meant, in the model's order; as in PEFT a name means every path that ends with it.

    Raises:
        ModelError: a name matches no linear layer.
    """
    modules = tuple(modules)
    hit = [path for path in layers if any(path == name or path.endswith(f".{name}") for name in modules)]
    for name in modules:
        if not any(path == name or path.endswith(f".{name}") for path in hit):
            raise ModelError(
                f"the adapter's target {name!r} matches no linear layer of this model",
                hint=f"choose from: {', '.join(dict.fromkeys(path.rsplit('.', 1)[-1] for path in layers))}",
            )
    return hit


def tensor_name(path: str, half: str) -> str:
    """What PEFT calls the matrix `half`, A or B, of a layer's adapter."""
    return f"base_model.model.{path}.lora_{half}.default.weight"


def on_disk(name: str) -> str:
    """The name in the file of a tensor that PEFT calls `name` in memory."""
    return name.replace(".default.", ".")


def tensor_shapes(layers: Layers, target: AdapterTarget) -> dict[str, tuple[int, int]]:
    """The shape of every tensor in the file of this adapter, by its name there.

    Raises:
        ModelError: as `adapted_layers`.
    """
    shapes = {}
    for path in adapted_layers(layers, target.modules):
        outputs, inputs = layers[path]
        shapes[on_disk(tensor_name(path, "A"))] = target.rank, inputs
        shapes[on_disk(tensor_name(path, "B"))] = outputs, target.rank
    return shapes


def check_tensor_shapes(saved: Mapping[str, tuple[int, ...]], expected: Mapping[str, Any], folder: Path) -> None:
    """Refuse an adapter whose tensors are not exactly the `expected` ones.

    Raises:
        ModelError: a tensor is missing, unknown or of another shape; they are counted and the first is named.
    """
    wrong = expected.keys() ^ saved.keys()
    wrong |= {name for name, shape in expected.items() if name in saved and saved[name] != shape}
    if wrong:
        raise ModelError(
            f"adapter {folder} does not fit this model: {len(wrong)} tensors are missing, unknown or of another shape, "
            f"first {min(wrong)}",
            hint="use the base model that the adapter was trained on",
        )


def write_settings(target: AdapterTarget, base: str, folder: Path, *, turned: bool) -> None:
    """Write the settings so that PEFT loads the adapter.

    Args:
        base: what its base model is to be found as.
        turned: the layers' weights are stored inputs x outputs, as GPT-2's are.
    """
    settings = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": turned,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": target.alpha,
        "lora_dropout": target.dropout,
        "peft_type": "LORA",
        "r": target.rank,
        "target_modules": list(target.modules),
        "task_type": "CAUSAL_LM",
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_settings(folder: Path, *, turned: bool) -> AdapterTarget:
    """What the settings in `folder` say; `turned` as for `write_settings`.

    Raises:
        ModelError: they are missing or broken, or the adapter is of a kind that is not plain LoRA.
    """
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        odd = {key: value for key, value in settings.items() if not _is_plain(key, value, turned=turned)}
        modules = tuple(settings["target_modules"])
        target = AdapterTarget(settings["r"], settings["lora_alpha"], settings.get("lora_dropout", 0.0), modules)
        sound = (
            isinstance(settings["target_modules"], list)
            and all(isinstance(name, str) for name in modules)
            and is_sound(target)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"adapter {folder} has no usable {SETTINGS}: {error}") from None
    if not sound:
        raise ModelError(f"adapter {folder} has no usable {SETTINGS}: a setting is of the wrong kind")
    if odd:
        key = min(odd)
        raise ModelError(
            f"adapter {folder} sets {key} to {odd[key]!r}; this backend does plain LoRA only",
            hint="use the torch backend for this adapter",
        )
    return target


def is_sound(target: AdapterTarget) -> bool:
    """Whether rank, alpha and dropout read from a file are numbers that an adapter can have."""
    return (
        type(target.rank) is int and target.rank > 0
        and type(target.alpha) in (int, float) and 0 < target.alpha < math.inf
        and type(target.dropout) in (int, float) and 0 <= target.dropout < 1
    )  # fmt: skip


def _is_plain(key: str, value: Any, *, turned: bool) -> bool:
    if key == "peft_type":
        return bool(value == "LORA")
    if key == "init_lora_weights":
        return value in (None, True, False, "gaussian")
    if key == "fan_in_fan_out" and turned:
        return True
    return key in _UNDERSTOOD | _WITHOUT_EFFECT or not value or (key, value) == ("bias", "none")
