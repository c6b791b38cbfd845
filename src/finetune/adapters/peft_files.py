"""An adapter's files in PEFT's own format: their names, their settings, and which layers they speak of.

Next to the tensors lies `adapter_config.json`. Of a layer at `path` the file holds A (rank x inputs) and B (outputs x
rank), named `base_model.model.<path>.lora_A.weight` and `...lora_B.weight`, with DoRA the magnitudes (outputs) too,
named `...lora_magnitude_vector`; of a module that was trained whole, its weights under their own names.

Source: `LoraConfig` and `get_peft_model_state_dict` of Hugging Face PEFT.
"""

import json
import math
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import ModelError
from finetune.records import AdapterTarget

Shape = tuple[int, ...]
Layers = Mapping[str, tuple[int, int]]
"""(outputs, inputs) of each linear layer by its path, whichever way round its weight is stored."""
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_UNDERSTOOD = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "peft_type",
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
}
_ENDINGS = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
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


def parts_of(target: AdapterTarget) -> str:
    """The letters of what each layer's adapter is made of: A and B, and m for magnitudes."""
    return "ABm" if target.kind == "dora" else "AB"


def tensor_name(path: str, part: str) -> str:
    """What PEFT calls a `part` of a layer's adapter: A, B or the magnitudes m."""
    return f"base_model.model.{path}.{_ENDINGS[part]}"


def saved_name(name: str) -> str:
    """What PEFT calls a weight of a module that is trained whole."""
    path, _, leaf = name.rpartition(".")
    return f"base_model.model.{path}.modules_to_save.default.{leaf}"


def frozen_name(name: str, adapted: Container[str], saved: Container[str]) -> str:
    """What PEFT calls a weight of the base once layers at the paths `adapted` and the weights `saved` are trained."""
    path, _, leaf = name.rpartition(".")
    inner = "base_layer." if path in adapted else "original_module." if name in saved else ""
    return f"base_model.model.{path}.{inner}{leaf}"


def on_disk(name: str) -> str:
    """The name in the file of a tensor that PEFT calls `name` in memory."""
    name = name.replace(".modules_to_save.default.", ".").replace("_vector.default.weight", "_vector")
    return name.replace(".default.", ".")


def tensor_shapes(layers: Layers, target: AdapterTarget, saved: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shape of every tensor in the file of this adapter, by its name there.

    Args:
        saved: the shape of each weight of the modules that are trained whole.

    Raises:
        ModelError: as `adapted_layers`.
    """
    shapes: dict[str, Shape] = {}
    for path in adapted_layers(layers, target.modules):
        (outputs, inputs), rank = layers[path], target.rank_of(path)
        sizes: dict[str, Shape] = {"A": (rank, inputs), "B": (outputs, rank), "m": (outputs,)}
        shapes |= {on_disk(tensor_name(path, part)): sizes[part] for part in parts_of(target)}
    return shapes | {on_disk(saved_name(name)): shape for name, shape in saved.items()}


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


def write_settings(target: AdapterTarget, base: str, folder: Path, *, transposed: bool) -> None:
    """Write the settings so that PEFT loads the adapter.

    Args:
        base: what its base model is to be found as.
        turned: the layers' weights are stored inputs x outputs, as GPT-2's are.
    """
    settings: dict[str, Any] = {
        "alpha_pattern": dict(target.alpha_pattern),
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": target.alpha,
        "lora_dropout": target.dropout,
        "modules_to_save": list(target.saved) or None,
        "peft_type": "LORA",
        "r": target.rank,
        "rank_pattern": dict(target.rank_pattern),
        "target_modules": list(target.modules),
        "task_type": "CAUSAL_LM",
        "use_dora": target.kind == "dora",
        "use_rslora": target.scaling == "rank_stabilized",
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_settings(folder: Path, *, transposed: bool) -> AdapterTarget:
    """What the settings in `folder` say; `transposed` as for `write_settings`.

    Raises:
        ModelError: they are missing or broken, or the adapter is of a kind that is neither LoRA nor DoRA.
    """
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        odd = {key: value for key, value in settings.items() if not _is_plain(key, value, transposed=transposed)}
        target = AdapterTarget(
            settings["r"],
            settings["lora_alpha"],
            settings.get("lora_dropout", 0.0),
            _names(settings["target_modules"]),
            "dora" if _switch(settings, "use_dora") else "lora",
            "rank_stabilized" if _switch(settings, "use_rslora") else "standard",
            dict(settings.get("rank_pattern") or {}),
            dict(settings.get("alpha_pattern") or {}),
            _names(settings.get("modules_to_save") or []),
        )
        sound = is_sound(target)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise ModelError(f"adapter {folder} has no usable {SETTINGS}: {error}") from None
    if not sound:
        raise ModelError(f"adapter {folder} has no usable {SETTINGS}: a setting is of the wrong kind")
    if odd:
        key = min(odd)
        raise ModelError(
            f"adapter {folder} sets {key} to {odd[key]!r}; this backend does LoRA and DoRA only",
            hint="use the torch backend for this adapter",
        )
    return target


def is_sound(target: AdapterTarget) -> bool:
    """Whether ranks, alphas and dropout read from a file are numbers that an adapter can have."""
    ranks, alphas = [target.rank, *target.rank_pattern.values()], [target.alpha, *target.alpha_pattern.values()]
    for pattern in (*target.rank_pattern, *target.alpha_pattern):
        re.compile(pattern)
    return (
        all(type(rank) is int and rank > 0 for rank in ranks)
        and all(type(alpha) in (int, float) and 0 < alpha < math.inf for alpha in alphas)
        and type(target.dropout) in (int, float)
        and 0 <= target.dropout < 1
    )


def _switch(settings: Mapping[str, Any], key: str) -> bool:
    if settings.get(key) not in (None, False, True):
        raise TypeError(f"{key} is neither true nor false")
    return bool(settings.get(key))


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError("a setting is of the wrong kind")
    return tuple(value)


def _is_plain(key: str, value: Any, *, transposed: bool) -> bool:
    if key == "peft_type":
        return bool(value == "LORA")
    if key == "init_lora_weights":
        return value in (None, True, False, "gaussian")
    if key == "fan_in_fan_out" and transposed:
        return True
    return key in _UNDERSTOOD | _WITHOUT_EFFECT or not value or (key, value) == ("bias", "none")
