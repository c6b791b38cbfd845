"""How positions turn queries and keys, as transformers writes it down and as GGUF does.

Source: `modeling_rope_utils.py` of Hugging Face transformers, `llm_graph` and `ggml_rope` of llama.cpp.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import ModelError
from finetune.export.settings import Settings

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class RopeSettings:
    """What GGUF says of the rotation: keys without the architecture's name, and factors of each frequency."""

    metadata: dict[str, Any]
    tensors: dict[str, Array]
    local_theta: float
    notes: tuple[str, ...] = ()


def read_rope(settings: Settings, known: Sequence[str], width: int, context: int) -> RopeSettings:
    """The rotation that a config describes, in the words of older and newer versions of transformers.

    Args:
        known: the kinds of scaling that llama.cpp computes for this architecture.
        width: how much of a head is turned.
        context: how many tokens the model reads.

    Raises:
        ModelError: the kind of scaling, or one of its settings, is none that llama.cpp computes.
    """
    rope, local = _said(settings)
    kind = {"su": "longrope"}.get(rope["rope_type"], rope["rope_type"])
    if kind not in known:
        raise ModelError(
            f"config.json: rope_type is {kind!r}, and llama.cpp computes {settings.get('model_type')} with "
            f"{', '.join(known)} only",
            hint="this model cannot be written as GGUF",
        )
    metadata: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    tensors: dict[str, Array] = {}
    notes: tuple[str, ...] = ()
    if kind in ("linear", "yarn"):
        metadata |= {"rope.scaling.type": kind, "rope.scaling.factor": _number(rope, "factor")}
    if kind == "yarn":
        metadata |= _yarn(rope, context)
    if kind == "llama3":
        tensors["rope_freqs.weight"] = _llama3_factors(rope, width, context)
    if settings.get("model_type") == "phi3":
        original = int(rope.get("original_max_position_embeddings") or context)
        metadata["rope.scaling.original_context_length"] = original
        if kind == "longrope":
            metadata["rope.scaling.attn_factor"] = _attention_factor(rope, settings, original)
            for name in ("long", "short"):
                tensors[f"rope_factors_{name}.weight"] = _factors(rope, f"{name}_factor", width)
            notes = (
                f"llama.cpp takes the long factors wherever it is opened for more than {original} tokens, "
                "also for shorter text",
            )
    return RopeSettings(metadata, tensors, local, notes)


def _said(settings: Settings) -> tuple[dict[str, Any], float]:
    """The rotation of layers that see everything, and the base of those with a window."""
    newer = settings.get("rope_parameters")
    theta = settings.get("rope_theta") or 10_000.0
    local = settings.get("rope_local_base_freq") or 10_000.0
    if isinstance(newer, Mapping) and isinstance(newer.get("full_attention"), Mapping):
        sliding = newer.get("sliding_attention") or {}
        local, newer = sliding.get("rope_theta", local), newer["full_attention"]
        if sliding.get("rope_type", "default") != "default":
            raise ModelError(f"config.json: rope_type of sliding layers is {sliding['rope_type']!r}, not 'default'")
    rope = dict(newer if isinstance(newer, Mapping) else settings.get("rope_scaling") or {})
    rope["rope_type"] = str(rope.get("rope_type") or rope.get("type") or "default").lower()
    rope.setdefault("rope_theta", theta)
    if not rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = settings.get("original_max_position_embeddings")
    return rope, float(local)


def _number(rope: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = rope.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"config.json: rope_parameters.{key} is {value!r}, not a number", hint="get the model again")
    return float(value)


def _yarn(rope: Mapping[str, Any], context: int) -> dict[str, Any]:
    odd = {key: rope[key] for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None}
    if odd or rope.get("truncate") is False:
        raise ModelError(
            f"config.json: rope_parameters sets {', '.join(odd) or 'truncate'}, which llama.cpp computes otherwise",
            hint="this model cannot be written as GGUF",
        )
    told: dict[str, Any] = {
        "rope.scaling.original_context_length": int(rope.get("original_max_position_embeddings") or context)
    }
    for key in ("beta_fast", "beta_slow"):
        if rope.get(key) is not None:
            told[f"rope.scaling.yarn_{key}"] = _number(rope, key)
    return told


def _llama3_factors(rope: Mapping[str, Any], width: int, context: int) -> Array:
    """By what each frequency is divided: nothing for short waves, the factor for long ones, in between in between."""
    factor = _number(rope, "factor", 8.0)
    low, high = _number(rope, "low_freq_factor", 1.0), _number(rope, "high_freq_factor", 4.0)
    original = float(rope.get("original_max_position_embeddings") or context)
    # In float32 from the first step on, as transformers has it.
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    waves = np.float32(2 * math.pi) / (np.float32(1) / np.power(np.float32(rope["rope_theta"]), exponents))
    smooth = (np.float32(original) / waves - np.float32(low)) / np.float32(high - low)
    between = np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth)
    return np.where(
        waves < original / high, np.float32(1), np.where(waves > original / low, np.float32(factor), between)
    )


def _factors(rope: Mapping[str, Any], key: str, width: int) -> Array:
    factors = rope.get(key)
    if not isinstance(factors, list) or len(factors) != width // 2:
        raise ModelError(
            f"config.json: rope_parameters.{key} must hold {width // 2} numbers, one a frequency",
            hint="get the model again",
        )
    return np.asarray(factors, np.float32)


def _attention_factor(rope: Mapping[str, Any], settings: Settings, original: int) -> float:
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor")
    scale = rope.get("factor") or settings.whole("max_position_embeddings") / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
