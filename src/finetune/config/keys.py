"""The dotted names of all settings, what each one accepts, and the nearest name to one that does not exist."""

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic import ValidationError

from finetune.config.schema import Spec, TrainingConfig

SECTIONS: dict[str, type[Spec]] = {
    name: field.annotation
    for name, field in TrainingConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Spec)
}
TOP_LEVEL: tuple[str, ...] = tuple(name for name in TrainingConfig.model_fields if name not in SECTIONS)
KEYS: tuple[str, ...] = (
    *(f"{section}.{name}" for section, spec in SECTIONS.items() for name in spec.model_fields),
    *TOP_LEVEL,
)
"""Every setting by dotted name, in the order of the schema."""

PROFILE_KEY = "profile"
"""Accepted next to the settings, but not one: it names a set of values."""

# What other trainers, and older versions of this one, call the same thing; difflib alone would not find these.
_NAMES_ELSEWHERE: dict[str, str] = {
    "lr": "training.learning_rate",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "iters": "training.max_steps",
    "micro_batch_size": "training.batch_size",
    "per_device_train_batch_size": "training.batch_size",
    "num_processes": "training.processes",
    "nproc_per_node": "training.processes",
    "accumulation": "training.gradient_accumulation_steps",
    "grad_accumulation_steps": "training.gradient_accumulation_steps",
    "sample_packing": "training.packing",
    "lr_scheduler_type": "training.schedule",
    "warmup_ratio": "training.warmup_fraction",
    "stop_after": "training.early_stopping_patience",
    "early_stopping": "training.early_stopping_patience",
    "patience": "training.early_stopping_patience",
    "stop_margin": "training.early_stopping_min_delta",
    "min_delta": "training.early_stopping_min_delta",
    "early_stopping_threshold": "training.early_stopping_min_delta",
    "keep": "training.load_best_model",
    "load_best_model_at_end": "training.load_best_model",
    "save_steps": "training.save_every",
    "steps_per_eval": "training.evaluate_every",
    "eval_steps": "training.evaluate_every",
    "report_to": "tracking.to",
    "wandb_project": "tracking.project",
    "run_name": "tracking.name",
    "wandb_name": "tracking.name",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "use_dora": "adapter.kind",
    "peft_use_dora": "adapter.kind",
    "fine_tune_type": "adapter.kind",
    "finetuning_type": "adapter.kind",
    "use_peft": "adapter.kind",
    "full_finetuning": "adapter.kind",
    "use_rslora": "adapter.scaling",
    "peft_use_rslora": "adapter.scaling",
    "lora_modules_to_save": "adapter.modules_to_save",
    "additional_target": "adapter.modules_to_save",
    "lora_plus_ratio": "training.loraplus_lr_ratio",
    "loraplus_ratio": "training.loraplus_lr_ratio",
    "targets": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "base_model": "model.path",
    "model_name_or_path": "model.path",
    "use_cpu": "model.device",
    "no_cuda": "model.device",
    "device_map": "model.device",
    "load_in_4bit": "model.quantize",
    "load_in_8bit": "model.quantize",
    "quantization_bit": "model.quantize",
    "quantization": "model.quantize",
    "q_bits": "model.quantize",
    "q_group_size": "model.quantize_group_size",
    "sham": "judge.control",
    "dataset": "data.train",
    "chat_template": "template.name",
    "overlong": "tokens.truncation",
    "truncation_mode": "tokens.truncation",
    "max_seq_length": "tokens.max_length",
    "max_seq_len": "tokens.max_length",
    "sequence_len": "tokens.max_length",
}

VALUES_ELSEWHERE: dict[tuple[str, str], str] = {
    ("adapter.kind", "qlora"): "set it to lora, and model.quantize to 4bit",
    ("training.load_best_model", "best"): "write true",
    ("training.load_best_model", "last"): "write false",
}
"""What other trainers, and older versions of this one, put into a setting, and what says it here."""


def split_key(key: str) -> tuple[str, str]:
    """Section and name of a dotted key; the section of a top-level one is empty."""
    section, _, name = key.rpartition(".")
    return section, name


def spec_of(key: str) -> type[Spec]:
    """The group of settings that an existing dotted key lives in."""
    section, _ = split_key(key)
    return SECTIONS[section] if section else TrainingConfig


def default_of(key: str) -> Any:
    """The value a setting has when nobody says anything."""
    return spec_of(key).model_fields[split_key(key)[1]].default


def description_of(key: str) -> str:
    """The sentence that explains a setting."""
    return spec_of(key).model_fields[split_key(key)[1]].description or ""


def parse_value(key: str, value: Any) -> Any:
    """The value as the setting holds it (numbers written as text become numbers); ValueError when it is refused."""
    name = split_key(key)[1]
    try:
        return getattr(spec_of(key).model_validate({name: value}), name)
    except ValidationError as error:
        raise ValueError(f"{key} refuses its value") from error


def flatten(config: TrainingConfig) -> dict[str, Any]:
    """Every setting's value by dotted key; the inverse of `unflatten`."""
    values = {f"{section}.{name}": value for section in SECTIONS for name, value in getattr(config, section)}
    return {**values, **{name: getattr(config, name) for name in TOP_LEVEL}}


def unflatten(values: Mapping[str, Any]) -> TrainingConfig:
    """The configuration with these values by dotted key, defaults elsewhere; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, name = split_key(key)
        if section:
            tree.setdefault(section, {})[name] = value
        else:
            tree[name] = value
    return TrainingConfig.model_validate(tree)


@cache
def schema_of(key: str) -> dict[str, Any]:
    """The JSON Schema of one setting's value."""
    properties: dict[str, dict[str, Any]] = spec_of(key).model_json_schema()["properties"]
    return properties[split_key(key)[1]]


def accepts_text(key: str) -> bool:
    """Whether the setting takes free text, so that `123` typed for it means the three characters."""
    return any(part.get("type") == "string" and "pattern" in part for part in _alternatives(schema_of(key)))


def accepts_null(key: str) -> bool:
    """Whether the setting may be left empty."""
    return any(part.get("type") == "null" for part in _alternatives(schema_of(key)))


def allowed_words(key: str) -> list[str]:
    """The fixed words a setting accepts, if it has any."""
    words: list[str] = []
    for part in _alternatives(schema_of(key)):
        words += part.get("enum", [part["const"]] if "const" in part else [])
    return [word for word in words if isinstance(word, str)]


def allowed_items(key: str) -> list[str]:
    """The fixed words that a list may hold, for a setting that takes such a list."""
    return [word for part in _alternatives(schema_of(key)) for word in part.get("items", {}).get("enum", [])]


def expectation(key: str) -> str:
    """What a setting accepts, in words: "a whole number of at least 1, or null"."""
    return ", or ".join(_phrase(part) for part in _alternatives(schema_of(key)))


def _alternatives(schema: dict[str, Any]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = schema.get("anyOf", [schema])
    return parts


def _phrase(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = schema["type"]
    if kind in ("integer", "number"):
        return f"{'a whole number' if kind == 'integer' else 'a number'} {_bounds(schema)}".strip()
    if kind == "array":
        words = schema["items"].get("enum")
        return "a list of " + (f"some of {', '.join(words)}, each once" if words else "at least one name")
    if kind == "object":
        [value] = schema["patternProperties"].values()
        return f"a mapping of at least one name to {_phrase(value)}"
    if kind == "string":
        return "a path ending in .jinja" if schema.get("pattern", "").endswith(r"\.jinja$") else "printable text"
    return "true or false" if kind == "boolean" else str(kind)


def _bounds(schema: dict[str, Any]) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f"from {schema['minimum']} to {schema['maximum']}"
    words = {"minimum": "of at least", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
    return " and ".join(f"{word} {schema[name]:g}" for name, word in words.items() if name in schema)


def nearest_key(wrong: str) -> str | None:
    """The existing setting or section that somebody who wrote `wrong` most likely meant."""
    section, name = split_key(wrong.lower().replace("-", "_"))
    if section in SECTIONS and name in SECTIONS[section].model_fields:
        return f"{section}.{name}"
    if name in _NAMES_ELSEWHERE:
        return _NAMES_ELSEWHERE[name]
    homes = [key for key in KEYS if split_key(key)[1] == name]
    if section in SECTIONS:
        near = get_close_matches(name, list(SECTIONS[section].model_fields), n=1)
        choices = [*homes, *(f"{section}.{found}" for found in near)]
    elif section:
        choices = [*get_close_matches(f"{section}.{name}", KEYS, n=1), *homes]
    else:
        choices = [*homes, *get_close_matches(name, [*SECTIONS, *TOP_LEVEL, PROFILE_KEY], n=1)]
    if not choices:
        names = {split_key(key)[1]: key for key in KEYS}
        choices = [names[found] for found in get_close_matches(name, list(names), n=1, cutoff=0.75)]
    return choices[0] if choices else None
