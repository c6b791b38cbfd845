"""Turn a configuration into a plan: nothing left open, each value with its origin."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.config.keys import default_of, flatten, unflatten
from finetune.config.load import LoadedConfig
from finetune.config.schema import TrainingConfig
from finetune.config.sources import Origin
from finetune.errors import ConfigError, Problem

LONGEST_BY_DEFAULT = 2048
"""Tokens per row unless somebody asks for more: enough for most data, and kind to memory."""
HELD_OUT_SHARE = 0.05
FEWEST_ROWS_TO_HOLD_OUT = 200
"""Below this many rows, 5 % is too few to measure a loss on and too many to lose."""
SHORTEST = 8


@dataclass(frozen=True, slots=True)
class ModelAndDataFacts:
    """What must be known of model and data before a configuration can be settled."""

    context_length: int
    has_chat_template: bool
    train_rows: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A configuration with nothing left open; `origins` says by dotted key where each value came from."""

    config: TrainingConfig
    origins: Mapping[str, Origin]


def resolve(loaded: LoadedConfig, facts: ModelAndDataFacts) -> Plan:
    """Settle everything but the step counts, which `resolve_steps` settles. Raises ConfigError with every conflict."""
    config, origins = loaded.config, loaded.origins
    derived: dict[str, Any] = {}
    fraction = config.data.valid_fraction
    if fraction is None:
        splits = config.data.valid is None and facts.train_rows >= FEWEST_ROWS_TO_HOLD_OUT
        fraction = derived["data.valid_fraction"] = HELD_OUT_SHARE if splits else 0.0
    problems = [*_length_problems(loaded, facts), *_split_problems(loaded), *_template_problems(loaded, facts)]
    problems += _adapter_problems(loaded)
    problems += _margin_problems(loaded)
    problems += _quantize_problems(loaded)
    if config.data.valid is None and not fraction:
        problems += early_stopping_without_validation_problems(config, loaded.origins)
    if problems:
        raise ConfigError(problems)
    if config.tokens.max_length is None:
        derived["tokens.max_length"] = min(facts.context_length, LONGEST_BY_DEFAULT)
    elif config.tokens.max_length > facts.context_length:  # only a profile's wish gets here
        derived["tokens.max_length"] = facts.context_length
    if config.judge.memory_length > facts.context_length:  # only the default gets here
        derived["judge.memory_length"] = facts.context_length
    if config.template.name == "auto":
        derived["template.name"] = "tokenizer" if facts.has_chat_template else "alpaca"
    if config.training.processes is None:
        derived["training.processes"] = 1
    return _settled(Plan(config, origins), derived)


def resolve_processes(loaded: LoadedConfig, started: int, *, resume: bool) -> LoadedConfig:
    """Settle among how many processes the work is shared, of which a launcher has started so many.

    A resumed run keeps its number: other processes, fewer or more, share out the same work.

    Raises:
        ConfigError: another number was asked for.
    """
    asked = loaded.config.training.processes
    if asked is None:
        training = loaded.config.training.model_copy(update={"processes": started})
        config = loaded.config.model_copy(update={"training": training})
        return LoadedConfig(config, {**loaded.origins, "training.processes": "derived"})
    if asked != started and not resume:
        what = f"processes is {asked}, but {started} {'process was' if started == 1 else 'processes were'} started"
        hint = "start them with --launch, such as: ft train --launch torchrun, or leave the setting out"
        raise ConfigError([Problem(what, f"training.processes ({loaded.origins['training.processes']})", hint)])
    return loaded


def resolve_steps(plan: Plan, total_steps: int) -> Plan:
    """Settle what depends on the number of steps: checkpoints and held-out losses about ten times a run.

    A checkpoint costs more than a look at the loss, so short runs make one every ten steps at most, and one at least.
    """
    training = plan.config.training
    tenth = max(1, round(total_steps / 10))
    derived: dict[str, Any] = {}
    if training.save_every is None:
        derived["training.save_every"] = max(1, min(total_steps, max(10, tenth)))
    if training.evaluate_every is None:
        derived["training.evaluate_every"] = tenth
    return _settled(plan, derived)


def early_stopping_without_validation_problems(config: TrainingConfig, origins: Mapping[str, Origin]) -> list[Problem]:
    """What cannot be done when no rows are held out: there is no loss to stop by, or to choose the best step by."""
    training = config.training
    asked = {
        "early_stopping_patience": training.early_stopping_patience,
        "load_best_model": "true" if training.load_best_model else None,
    }
    return [
        Problem(
            f"{name} is {value}, but no rows are held out to look at the loss on",
            f"training.{name} ({origins[f'training.{name}']})",
            "hold rows out with data.valid, or with data.valid_fraction (0.05, for example), or leave it out",
        )
        for name, value in asked.items()
        if value is not None
    ]


def _settled(plan: Plan, derived: Mapping[str, Any]) -> Plan:
    config = unflatten({**flatten(plan.config), **derived})
    return Plan(config, {**plan.origins, **dict.fromkeys(derived, "derived")})


def _length_problems(loaded: LoadedConfig, facts: ModelAndDataFacts) -> list[Problem]:
    if facts.context_length < SHORTEST:
        what = f"the model reads only {facts.context_length} tokens at a time, fewer than the {SHORTEST} a row needs"
        return [Problem(what, "model.path", "choose another model")]
    asked = {
        "tokens.max_length": loaded.config.tokens.max_length,
        "judge.memory_length": loaded.config.judge.memory_length,
    }
    return [
        Problem(
            f"{key.partition('.')[2]} is {length}, but the model reads at most {facts.context_length} tokens",
            f"{key} ({loaded.origins[key]})",
            f"set it to {facts.context_length} or less, or leave it out",
        )
        for key, length in asked.items()
        # A profile or a default does not know the model; its wish is lowered instead.
        if length is not None and length > facts.context_length and loaded.origins[key] not in ("profile", "default")
    ]


def _split_problems(loaded: LoadedConfig) -> list[Problem]:
    data = loaded.config.data
    if data.valid is None or not data.valid_fraction:
        return []
    what = f"valid_fraction is {data.valid_fraction}, but data.valid names held-out rows already: {data.valid!r}"
    where = f"data.valid_fraction ({loaded.origins['data.valid_fraction']})"
    return [Problem(what, where, "leave out one of the two")]


def _margin_problems(loaded: LoadedConfig) -> list[Problem]:
    training = loaded.config.training
    if training.early_stopping_patience is not None or not training.early_stopping_min_delta:
        return []
    what = (
        f"early_stopping_min_delta is {training.early_stopping_min_delta:g}, but nothing is stopped early: "
        "early_stopping_patience is not set"
    )
    where = f"training.early_stopping_min_delta ({loaded.origins['training.early_stopping_min_delta']})"
    return [Problem(what, where, "set training.early_stopping_patience as well, or leave it out")]


def _template_problems(loaded: LoadedConfig, facts: ModelAndDataFacts) -> list[Problem]:
    if loaded.config.template.name != "tokenizer" or facts.has_chat_template:
        return []
    where = f"template.name ({loaded.origins['template.name']})"
    what = "template is tokenizer, but this model's tokenizer has no chat template"
    return [Problem(what, where, "use auto, alpaca, chatml, llama2, llama3 or a .jinja file")]


def _quantize_problems(loaded: LoadedConfig) -> list[Problem]:
    """What a quantised base cannot be trained with, or a size of groups that nothing is quantised in."""
    config, quantize = loaded.config, loaded.config.model.quantize
    if quantize is None:
        size, origin = config.model.quantize_group_size, loaded.origins["model.quantize_group_size"]
        if size == default_of("model.quantize_group_size") or origin == "profile":
            return []
        what = f"quantize_group_size is {size}, but nothing is quantised: quantize is not set"
        return [Problem(what, f"model.quantize_group_size ({origin})", "set model.quantize as well, or leave it out")]
    where = f"model.quantize ({loaded.origins['model.quantize']})"
    problems = []
    if config.backend != "mlx":
        what = f"quantize is {quantize}, but the {config.backend} backend trains on full weights only"
        hint = "set backend: mlx, which alone quantises in this version (bitsandbytes is not in it), or leave it out"
        problems.append(Problem(what, where, hint))
    if config.adapter.kind == "full":
        what = f"quantize is {quantize}, but adapter.kind is full: what is quantised cannot be trained"
        problems.append(Problem(what, where, "set adapter.kind to lora or dora, or leave it out"))
    return problems


def _adapter_problems(loaded: LoadedConfig) -> list[Problem]:
    """What is said of an adapter where none is trained; a profile does not know that there is none."""
    if loaded.config.adapter.kind != "full":
        return []
    values = flatten(loaded.config)
    idle = [key for key in values if key.startswith("adapter.") and key != "adapter.kind"]
    return [
        Problem(
            "adapter.kind is full: every weight is trained, and there is no adapter that this could be said of",
            f"{key} ({loaded.origins[key]})",
            "leave it out, or set adapter.kind to lora or dora",
        )
        for key in (*idle, "training.loraplus_lr_ratio")
        if values[key] != default_of(key) and loaded.origins[key] != "profile"
    ]
