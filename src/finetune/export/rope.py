"""Rotary position settings: from transformers' config to GGUF's keys and factors.

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
    """GGUF's keys, without the architecture's prefix, and the factors of each frequency."""

    metadata: dict[str, Any]
    tensors: dict[str, Array]
    local_theta: float
    notes: tuple[str, ...] = ()


def read_rope(settings: Settings, known: Sequence[str], width: int, context: int) -> RopeSettings:
    """Read the rotation that a config describes, in the spelling of older or newer transformers.

    Args:
        known: the kinds of scaling that llama.cpp computes for this architecture.
        width: how many numbers of a head are rotated.
        context: the model's context length.

    Raises:
        ModelError: the kind of scaling, or one of its settings, is none that llama.cpp computes.
    """
    rope, local = _rope_of(settings)
    kind = "longrope" if rope["rope_type"] == "su" else str(rope["rope_type"])  # Phi-3's older name of it
    if kind not in known:
        raise ModelError(
            f"config.json: rope_type is {kind!r}, and llama.cpp computes {settings.get('model_type')} with "
            f"{', '.join(known)} only",
            hint="this model cannot be written as GGUF",
        )
    metadata: dict[str, Any] = {"rope.freq_base": _number(rope, "rope_theta")}
    tensors: dict[str, Array] = {}
    notes: tuple[str, ...] = ()
    if kind in ("linear", "yarn"):
        metadata |= {"rope.scaling.type": kind, "rope.scaling.factor": _number(rope, "factor")}
    if kind == "yarn":
        metadata |= _yarn(rope, context)
    if kind == "llama3":
        tensors["rope_freqs.weight"] = _llama3_factors(rope, width, context)
    if settings.get("model_type") == "phi3":
        original = _original_context(rope, context)
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


def _rope_of(settings: Settings) -> tuple[dict[str, object], float]:
    """The rotation of full-attention layers, and the base (theta) of sliding ones.

    transformers 5 writes `rope_parameters`, with a dictionary a kind of layer where kinds differ; before there were
    `rope_theta` and `rope_scaling` (its `type` now `rope_type`), and Gemma 3's `rope_local_base_freq`.
    """
    newer = settings.get("rope_parameters")
    theta = settings.get("rope_theta") or 10_000.0
    local = settings.get("rope_local_base_freq") or 10_000.0
    if isinstance(newer, Mapping) and isinstance(newer.get("full_attention"), Mapping):
        sliding = newer.get("sliding_attention") or {}
        local, newer = sliding.get("rope_theta", local), newer["full_attention"]
        if sliding.get("rope_type", "default") != "default":
            raise ModelError(f"config.json: rope_type of sliding layers is {sliding['rope_type']!r}, not 'default'")
    rope: dict[str, object] = dict(newer if isinstance(newer, Mapping) else settings.get("rope_scaling") or {})
    rope["rope_type"] = str(rope.get("rope_type") or rope.get("type") or "default").lower()
    rope.setdefault("rope_theta", theta)
    if not rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = settings.get("original_max_position_embeddings")
    return rope, float(local)


def _number(rope: Mapping[str, object], key: str, default: float | None = None) -> float:
    value = rope.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"config.json: rope_parameters.{key} is {value!r}, not a number", hint="get the model again")
    return float(value)


def _original_context(rope: Mapping[str, object], context: int) -> int:
    key = "original_max_position_embeddings"
    return int(_number(rope, key)) if rope.get(key) else context


def _yarn(rope: Mapping[str, object], context: int) -> dict[str, Any]:
    odd = {key: rope[key] for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key) is not None}
    if odd or rope.get("truncate") is False:
        raise ModelError(
            f"config.json: rope_parameters sets {', '.join(odd) or 'truncate'}, which llama.cpp computes otherwise",
            hint="this model cannot be written as GGUF",
        )
    keys: dict[str, Any] = {"rope.scaling.original_context_length": _original_context(rope, context)}
    for key in ("beta_fast", "beta_slow"):
        if rope.get(key) is not None:
            keys[f"rope.scaling.yarn_{key}"] = _number(rope, key)
    return keys


def _llama3_factors(rope: Mapping[str, object], width: int, context: int) -> Array:
    """The divisor of each frequency: 1 for short waves, `factor` for long ones, interpolated in between.

    A wave is long when fewer than `low` of its periods fit the original context, short when more than `high` do.
    """
    factor = _number(rope, "factor", 8.0)
    low, high = _number(rope, "low_freq_factor", 1.0), _number(rope, "high_freq_factor", 4.0)
    original = _original_context(rope, context)
    # In float32 from the first step on, as in transformers: float64 would round to other factors.
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    waves = np.float32(2 * math.pi) / (np.float32(1) / np.power(np.float32(_number(rope, "rope_theta")), exponents))
    smooth = (np.float32(original) / waves - np.float32(low)) / np.float32(high - low)
    between = np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth)
    return np.where(
        waves < original / high, np.float32(1), np.where(waves > original / low, np.float32(factor), between)
    )


def _factors(rope: Mapping[str, object], key: str, width: int) -> Array:
    factors = rope.get(key)
    if not isinstance(factors, list) or len(factors) != width // 2:
        raise ModelError(
            f"config.json: rope_parameters.{key} must hold {width // 2} numbers, one a frequency",
            hint="get the model again",
        )
    return np.asarray(factors, np.float32)


def _attention_factor(rope: Mapping[str, object], settings: Settings, original: int) -> float:
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor")
    stretch = settings.whole("max_position_embeddings") / original
    scale = _number(rope, "factor") if rope.get("factor") else stretch
    # LongRoPE (arXiv:2402.13753, section 3.3): attention grows sharper as the context is stretched.
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def rope_parameters(
    metadata: Mapping[str, Any], factors: Mapping[str, Array], width: int, context: int
) -> dict[str, Any]:
    """The `rope_parameters` of a config from GGUF's keys, without the architecture's prefix: inverse of `read_rope`.

    Args:
        factors: the tensors that hold a number for each frequency, by their names.

    Raises:
        ModelError: the kind of scaling is unknown, or no config of transformers gives these factors.
    """
    theta, kind = shortest(metadata.get("rope.freq_base", 10_000.0)), metadata.get("rope.scaling.type") or "none"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    original = metadata.get("rope.scaling.original_context_length")
    if "rope_freqs.weight" in factors:
        return {**rope, **_llama3_settings(factors["rope_freqs.weight"], theta, width, context)}
    if "rope_factors_long.weight" in factors:
        long, short = (factors.get(f"rope_factors_{name}.weight") for name in ("long", "short"))
        if short is None or long is None or long.shape != short.shape or long.shape != (width // 2,):
            raise ModelError(f"rope_factors_long and rope_factors_short must both hold {width // 2} numbers", hint=_GET)
        return rope | {
            "rope_type": "longrope",
            "long_factor": [shortest(each) for each in long.tolist()],
            "short_factor": [shortest(each) for each in short.tolist()],
            "attention_factor": shortest(metadata.get("rope.scaling.attn_factor", 1.0)),
            "original_max_position_embeddings": original or context,
        }
    if kind in ("none", "longrope"):
        return rope
    factor = shortest(metadata.get("rope.scaling.factor", 1.0))
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or metadata.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise ModelError(
            f"rope.scaling.type is {str(kind)[:80]!r} (attn_factor {metadata.get('rope.scaling.attn_factor')}), which "
            "cannot be read",
            hint="what can be: none, linear, longrope, and yarn without an attn_factor",
        )
    rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original or context}
    for key in ("beta_fast", "beta_slow"):
        if (beta := metadata.get(f"rope.scaling.yarn_{key}")) is not None:
            rope[key] = shortest(beta)
    return rope


def _llama3_settings(factors: Array, theta: float, width: int, context: int) -> dict[str, Any]:
    """The settings of Llama 3's scaling that give these factors, number for number.

    Only the ratios of the two bounds to the original context decide, so that the bounds may be taken as 1 and 4.
    """
    rope = {"rope_theta": theta, "factor": shortest(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for original in (8192, *(2**power for power in range(3, 22)), context):
        tried = {"rope_type": "llama3", **rope, "original_max_position_embeddings": original}
        if np.array_equal(_llama3_factors(tried, width, context), factors):
            return tried
    raise ModelError(
        f"rope_freqs.weight holds factors up to {factors.max():g} that Llama 3's formula does not give",
        hint="get the model's own files instead of this GGUF",
    )


def shortest(value: float) -> float:
    """The number of fewest digits that is this one in float32, as GGUF keeps settings: 1e-5, not 9.9999997e-06."""
    return float(str(np.float32(value)))


_GET = "get the file again"
