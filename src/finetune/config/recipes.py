"""Starting points for models that people fine-tune: what differs by family and size, and nothing that is derived."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.config.plan_file import yaml_line

_HEAD = "# A FineTune configuration; `ft init` without options writes every setting, explained.\n"
_DATA = "rows.jsonl"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model by its hub id, whether its licence must be accepted first, and the settings that its size asks for."""

    model: str
    values: Mapping[str, Any]
    gated: bool = False


_TINY = {"training.batch_size": 8}
_SMALL = {"model.dtype": "bfloat16", "training.batch_size": 4, "training.gradient_accumulation_steps": 4}
_LARGE = {"model.dtype": "bfloat16", "training.batch_size": 1, "training.gradient_accumulation_steps": 16}
RECIPES: Mapping[str, Recipe] = {
    "smollm2-135m": Recipe("HuggingFaceTB/SmolLM2-135M-Instruct", _TINY),
    "smollm2-1.7b": Recipe("HuggingFaceTB/SmolLM2-1.7B-Instruct", _SMALL),
    "qwen2.5-0.5b": Recipe("Qwen/Qwen2.5-0.5B-Instruct", _TINY),
    "qwen2.5-7b": Recipe("Qwen/Qwen2.5-7B-Instruct", _LARGE),
    "qwen3-0.6b": Recipe("Qwen/Qwen3-0.6B", {**_TINY, "template.train_on": "last"}),
    "qwen3-4b": Recipe("Qwen/Qwen3-4B-Instruct-2507", _LARGE),
    "qwen3-8b": Recipe("Qwen/Qwen3-8B", {**_LARGE, "template.train_on": "last"}),
    "llama3.2-1b": Recipe("meta-llama/Llama-3.2-1B-Instruct", _SMALL, gated=True),
    "llama3.1-8b": Recipe("meta-llama/Llama-3.1-8B-Instruct", _LARGE, gated=True),
    "gemma3-1b": Recipe("google/gemma-3-1b-it", _SMALL, gated=True),
    "mistral-7b": Recipe("mistralai/Mistral-7B-Instruct-v0.3", _LARGE),
    "gpt2": Recipe("openai-community/gpt2", {**_TINY, "template.name": "alpaca"}),
}
"""By family and size. Rate and epochs are derived from size and rows, so that no recipe names them."""


def minimal_config(recipe: str | None = None, *, profile: str | None = None) -> str:
    """A configuration file with what most runs set, and no more.

    Args:
        recipe: whose model and values are written; else the shipped model.
        profile: a named starting point that is written, too.
    """
    chosen = RECIPES[recipe] if recipe else None
    values: dict[str, Any] = {
        "model.path": chosen.model if chosen else "reference-llama",
        **(chosen.values if chosen else {}),
    }
    values |= {"data.train": _DATA}
    notes = ["# Chosen for its size, not tried on it: `ft estimate` tells the memory before a run."] if recipe else []
    if chosen and chosen.gated:
        notes.append(f"# Accept its licence at https://huggingface.co/{chosen.model}, then: hf auth login")
    lines = [f"profile: {profile}"] if profile else []
    for section in dict.fromkeys(key.partition(".")[0] for key in values):
        inner = [(key.partition(".")[2], value) for key, value in values.items() if key.startswith(f"{section}.")]
        lines += [f"{section}:", *(f"  {yaml_line(name, value)}" for name, value in inner)]
    more = ["", "# Derived where they are not set, from the model's size and the rows:", "# training:"]
    more = [*more, "#   epochs: 3", "#   learning_rate: 2.0e-4"]
    if "training:" in lines:
        more = ["  # Derived where they are not set, from the model's size and the rows:", "  # epochs: 3"]
        more += ["  # learning_rate: 2.0e-4"]
        at = lines.index("training:") + 1
        lines[at:at] = more
        more = []
    return _HEAD + "\n".join([*notes, *lines, *more]) + "\n"
