"""The dotted names of all settings, what each one accepts, and the nearest name to one that does not exist."""

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from pydantic.fields import FieldInfo

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

_VALUES_SHORT = {"bf16": "bfloat16", "fp32": "float32", "load_in_4bit": "4bit", "load_in_8bit": "8bit", "qlora": "4bit"}
"""What other trainers call a value."""

# What other trainers, and older versions of this one, call a setting; difflib alone would not find these.
_NAMES_ELSEWHERE: dict[str, str] = {
    "training.dpo_beta": "beta pref_beta",
    "training.learning_rate": "lr",
    "training.epochs": "num_train_epochs num_epochs",
    "training.max_steps": "iters",
    "training.batch_size": "micro_batch_size per_device_train_batch_size",
    "training.processes": "num_processes nproc_per_node",
    "training.gradient_accumulation_steps": "accumulation grad_accumulation_steps",
    "training.gradient_checkpointing": "grad_checkpoint use_gradient_checkpointing activation_checkpointing",
    "training.packing": "sample_packing",
    "training.schedule": "lr_scheduler_type",
    "training.warmup_fraction": "warmup_ratio",
    "training.early_stopping_patience": "stop_after early_stopping patience",
    "training.early_stopping_min_delta": "stop_margin min_delta early_stopping_threshold",
    "training.load_best_model": "keep load_best_model_at_end",
    "training.save_every": "save_steps",
    "training.evaluate_every": "steps_per_eval eval_steps",
    "tracking.to": "report_to",
    "tracking.project": "wandb_project",
    "tracking.name": "run_name wandb_name",
    "adapter.rank": "r lora_r lora_rank",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.kind": "use_dora peft_use_dora fine_tune_type finetuning_type use_peft full_finetuning",
    "adapter.scaling": "use_rslora peft_use_rslora",
    "adapter.modules_to_save": "lora_modules_to_save additional_target",
    "training.loraplus_lr_ratio": "lora_plus_ratio loraplus_ratio",
    "adapter.target_modules": "targets lora_target_modules",
    "model.path": "base_model model_name_or_path",
    "model.device": "use_cpu no_cuda device_map",
    "model.quantize": "load_in_4bit load_in_8bit quantization_bit quantization q_bits",
    "model.quantize_group_size": "q_group_size",
    "judge.control": "sham",
    "data.train": "dataset",
    "data.columns": "column_mapping field_mapping prompt_feature",
    "data.ignore_columns": "remove_columns",
    "template.name": "chat_template",
    "tokens.truncation": "overlong truncation_mode",
    "tokens.max_length": "max_seq_length max_seq_len sequence_len",
}

VALUES_ELSEWHERE: dict[tuple[str, str], str] = {
    ("adapter.kind", "qlora"): "set it to lora, and model.quantize to 4bit",
    (
        "training.objective",
        "kto",
    ): "for answers marked good or bad use TRL's KTOTrainer, or pair them up for dpo",
    ("training.objective", "reward"): "for a model that scores use TRL's RewardTrainer, or use dpo on its pairs",
    ("training.objective", "grpo"): "to sample while training use TRL's GRPOTrainer, or dpo on ranked answers",
    ("training.objective", "ppo"): "to sample while training use TRL's PPOTrainer, or dpo on ranked answers",
    ("training.objective", "orpo"): "use TRL's ORPOTrainer, or dpo on the same pairs",
    ("training.load_best_model", "best"): "write true",
    ("training.load_best_model", "last"): "write false",
}
"""What other trainers, and older versions of this one, put into a setting, and what says it here."""


def split_key(key: str) -> tuple[str, str]:
    """Section and name of a dotted key; the section of a top-level one is empty."""
    section, _, name = key.rpartition(".")
    return section, name


def _field_of(key: str) -> FieldInfo:
    section, name = split_key(key)
    return (SECTIONS[section] if section else TrainingConfig).model_fields[name]


def default_of(key: str) -> Any:
    """The value a setting has when nobody says anything."""
    return _field_of(key).default


def description_of(key: str) -> str:
    """The sentence that explains a setting, or a section."""
    said = SECTIONS[key].__doc__ if key in SECTIONS else _field_of(key).description
    return " ".join((said or "").split())


def flatten(config: TrainingConfig) -> dict[str, Any]:
    """Every setting's value by dotted key; the inverse of `unflatten`."""
    values = {f"{section}.{name}": value for section in SECTIONS for name, value in getattr(config, section)}
    return {**values, **{name: getattr(config, name) for name in TOP_LEVEL}}


def unflatten(values: Mapping[str, object]) -> TrainingConfig:
    """The configuration with these values by dotted key, defaults elsewhere; the inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        section, name = split_key(key)
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return TrainingConfig.model_validate(tree)


@cache
def choices_of(key: str) -> list[dict[str, Any]]:
    """What a setting accepts, as JSON Schemas of which one must fit."""
    section, name = split_key(key)
    schema = (SECTIONS[section] if section else TrainingConfig).model_json_schema()["properties"][name]
    choices: list[dict[str, Any]] = schema.get("anyOf", [schema])
    return choices


def accepts_text(key: str) -> bool:
    """Whether the setting takes free text, so that `123` typed for it means the three characters."""
    return any(choice.get("type") == "string" and "pattern" in choice for choice in choices_of(key))


def expectation(key: str) -> str:
    """What a setting accepts, in words: "a whole number of at least 1, or null"."""
    return ", or ".join(_phrase(choice) for choice in choices_of(key))


def _phrase(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = schema["type"]
    if kind in ("integer", "number"):
        limits = {"minimum": "of at least", "exclusiveMinimum": "above", "exclusiveMaximum": "below"}
        words = [f"{word} {schema[name]:g}" for name, word in limits.items() if name in schema]
        if "minimum" in schema and "maximum" in schema:
            words = [f"from {schema['minimum']} to {schema['maximum']}"]
        return f"{'a whole number' if kind == 'integer' else 'a number'} {' and '.join(words)}".strip()
    if kind == "array":
        names = schema["items"].get("enum")
        if "maxItems" in schema:
            return (
                f"a list of up to {schema['maxItems']:,} names, each of 1 to {schema['items']['maxLength']} characters"
            )
        return "a list of " + (f"some of {', '.join(names)}, each once" if names else "at least one name")
    if kind == "object":
        [(pattern, value)] = schema["patternProperties"].items()
        few = pattern.strip("^()$").replace("|", ", ") if "|" in pattern else ""
        return f"a mapping of {few or 'at least one name'} to {', or '.join(map(_phrase, value.get('anyOf', [value])))}"
    if kind == "string":
        pattern = schema.get("pattern", "")
        if pattern.startswith("^[0-9]"):
            return "a day, such as 2024-07-26"
        return "a path ending in .jinja" if pattern.endswith(r"\.jinja$") else "printable text"
    return "true or false" if kind == "boolean" else str(kind)


def nearest_key(wrong: str) -> str | None:
    """The existing setting or section that somebody who wrote `wrong` most likely meant."""
    section, name = split_key(wrong.lower().replace("-", "_"))
    if section in SECTIONS and name in SECTIONS[section].model_fields:
        return f"{section}.{name}"
    if found := next((key for key, others in _NAMES_ELSEWHERE.items() if name in others.split()), None):
        return found
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


def nearest_assignment(option: str) -> str | None:
    """The setting with its value that an option without a value most likely meant, such as `--bf16` or `--dpo`."""
    name = _VALUES_SHORT.get(option.lower(), option.lower())
    for key in KEYS:
        if name in [word for choice in choices_of(key) for word in choice.get("enum", [choice.get("const")])]:
            return f"{key}={name}"
    meant = nearest_key(name)
    if meant in KEYS and any(choice.get("type") == "boolean" for choice in choices_of(meant)):
        return f"{meant}=true"
    return None
