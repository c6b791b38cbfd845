"""Turn a configuration into a plan: nothing left open, each value with its origin."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.abilities import ABILITIES
from finetune.adapters.kinds import ADAPTER_KINDS, any_of
from finetune.config.derive import derived_epochs, derived_learning_rate
from finetune.config.keys import default_of, flatten, unflatten
from finetune.config.load import LoadedConfig, Origin
from finetune.config.schema import TrainingConfig
from finetune.errors import ConfigError, Problem

LONGEST_BY_DEFAULT = 2048
"""Tokens per row unless somebody asks for more: enough for most data, and kind to memory."""
HELD_OUT_SHARE = 0.05
FEWEST_ROWS_TO_HOLD_OUT = 200
"""Below this many rows, 5% is too few to measure a loss on and too many to lose."""
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
    """Settle all but what `resolve_training` and `resolve_steps` settle. Raises ConfigError with every conflict."""
    config, origins = loaded.config, loaded.origins
    derived: dict[str, Any] = {}
    fraction = config.data.valid_fraction
    if fraction is None:
        splits = config.data.valid is None and facts.train_rows >= FEWEST_ROWS_TO_HOLD_OUT
        fraction = derived["data.valid_fraction"] = HELD_OUT_SHARE if splits else 0.0
    problems = [*_length_problems(loaded, facts), *_conflicts(loaded, facts), *_quantize_problems(loaded)]
    problems += [*new_token_problems(loaded), *_objective_problems(loaded)]
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
    elif config.template.name.endswith(".jinja") and not Path(config.template.name).is_absolute():
        # Where a run is resumed, another folder's file may have this name.
        derived["template.name"] = str(Path(config.template.name).absolute())
    if config.training.objective == "dpo":
        derived["template.train_on"] = "last"  # what both sides of a pair share says nothing of either
    if config.training.processes is None:
        derived["training.processes"] = 1
    return _settled(Plan(config, origins), derived)


def resolve_processes(loaded: LoadedConfig, started: int, *, resume: bool) -> LoadedConfig:
    """Settle among how many processes the work is shared, of which a launcher has started so many.

    A resumed run keeps its number: other processes, fewer or more, share out the same work.

    Raises:
        ConfigError: another number was asked for.
    """
    wanted = loaded.config.training.processes
    if wanted is None:
        training = loaded.config.training.model_copy(update={"processes": started})
        config = loaded.config.model_copy(update={"training": training})
        return LoadedConfig(config, {**loaded.origins, "training.processes": "derived"})
    if wanted != started and not resume:
        what = f"processes is {wanted}, but {started} {'process was' if started == 1 else 'processes were'} started"
        hint = "start them with --launch, such as: ft train --launch torchrun, or leave the setting out"
        raise ConfigError([_problem(loaded.origins, "training.processes", what, hint)])
    return loaded


def resolve_training(plan: Plan, *, parameters: int, rows: int, steps_per_epoch: int) -> Plan:
    """Settle how fast and how long is trained, from the model's size, the rows and how many steps they make."""
    training = plan.config.training
    derived: dict[str, Any] = {}
    if training.learning_rate is None:
        derived["training.learning_rate"] = derived_learning_rate(
            parameters, plan.config.adapter.kind, training.objective
        )
    if training.epochs is None:
        derived["training.epochs"] = derived_epochs(rows, steps_per_epoch)
    return _settled(plan, derived)


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


def early_stopping_without_validation_problems(
    config: TrainingConfig, origins: Mapping[str, Origin], why: str = ""
) -> list[Problem]:
    """What cannot be done when no rows are held out: there is no loss to stop by, or to choose the best step by."""
    why = why or "no rows are held out to look at the loss on"
    training = config.training
    values = {
        "early_stopping_patience": training.early_stopping_patience,
        "load_best_model": "true" if training.load_best_model else None,
    }
    hint = "hold rows out with data.valid, or with data.valid_fraction (0.05, for example), or leave it out"
    return [
        _problem(origins, f"training.{name}", f"{name} is {value}, but {why}", hint)
        for name, value in values.items()
        if value is not None
    ]


def _problem(origins: Mapping[str, Origin], key: str, what: str, hint: str) -> Problem:
    return Problem(what, f"{key} ({origins[key]})", hint)


def _settled(plan: Plan, derived: Mapping[str, object]) -> Plan:
    config = unflatten({**flatten(plan.config), **derived})
    return Plan(config, {**plan.origins, **dict.fromkeys(derived, "derived")})


def _length_problems(loaded: LoadedConfig, facts: ModelAndDataFacts) -> list[Problem]:
    longest = facts.context_length
    if longest < SHORTEST:
        what = f"the model reads only {longest} tokens at a time, fewer than the {SHORTEST} a row needs"
        return [Problem(what, "model.path", "choose another model")]
    return [
        _problem(
            loaded.origins,
            f"{section}.{name}",
            f"{name} is {length}, but the model reads at most {longest} tokens",
            f"set it to {longest} or less, or leave it out",
        )
        for section, name, length in (
            ("tokens", "max_length", loaded.config.tokens.max_length),
            ("judge", "memory_length", loaded.config.judge.memory_length),
        )
        # A profile or a default does not know the model; its wish is lowered instead.
        if (length or 0) > longest and loaded.origins[f"{section}.{name}"] not in ("profile", "default")
    ]


def _conflicts(loaded: LoadedConfig, facts: ModelAndDataFacts) -> Iterator[Problem]:
    """Settings that contradict each other, or the model."""
    config, origins = loaded.config, loaded.origins
    data, training = config.data, config.training
    if data.valid is not None and data.valid_fraction:
        what = f"valid_fraction is {data.valid_fraction}, but data.valid names held-out rows already: {data.valid!r}"
        yield _problem(origins, "data.valid_fraction", what, "leave out one of the two")
    if config.template.name == "tokenizer" and not facts.has_chat_template:
        what = "template is tokenizer, but this model's tokenizer has no chat template"
        yield _problem(origins, "template.name", what, "use auto, alpaca, chatml, llama2, llama3 or a .jinja file")
    kind, values = config.adapter.kind, flatten(config)
    what = f"adapter.kind is {kind}, which has no such setting"
    if kind not in ADAPTER_KINDS:
        what = f"adapter.kind is {kind}: every weight is trained, and there is no adapter that this could be said of"
    for key in (*(key for key in values if key.startswith("adapter.")), "training.loraplus_lr_ratio"):
        takers = [name for name, each in ADAPTER_KINDS.items() if each.takes(key)]
        # A profile does not know which kind it is.
        is_set = values[key] != default_of(key) and origins[key] != "profile"
        if is_set and key != "adapter.kind" and kind not in takers:
            yield _problem(origins, key, what, f"leave it out, or set adapter.kind to {any_of(takers)}")
    if training.gradient_checkpointing and not ABILITIES[config.backend].checkpointing:
        able = any_of([name for name, each in ABILITIES.items() if each.checkpointing])
        what = f"gradient_checkpointing is true, but the {config.backend} backend keeps all that it computes"
        yield _problem(origins, "training.gradient_checkpointing", what, f"set backend to {able}, or leave it out")
    if training.early_stopping_min_delta and training.early_stopping_patience is None:
        what = (
            f"early_stopping_min_delta is {training.early_stopping_min_delta:g}, but nothing is stopped early: "
            "early_stopping_patience is not set"
        )
        hint = "set training.early_stopping_patience as well, or leave it out"
        yield _problem(origins, "training.early_stopping_min_delta", what, hint)


def new_token_problems(loaded: LoadedConfig) -> list[Problem]:
    """Why tokens cannot be learned: they are none, or this kind of adapter has no place for rows of a table."""
    config, kind = loaded.config, loaded.config.adapter.kind
    named = [f"tokens.{name}" for name in ("add_special_tokens", "add_tokens") if getattr(config.tokens, name)]
    problems: list[Problem] = []
    for key in named:
        for token in getattr(config.tokens, key.removeprefix("tokens.")):
            what, hint = "", "choose another name, such as <|name|>"
            if token != token.strip():
                what, hint = f"{token!r} begins or ends with white space", "leave the white space out"
            elif config.tokens.learned.count(token) > 1:
                what, hint = f"{token!r} is named twice", "name each token once"
            elif longer := [each for each in config.tokens.learned if token in each and token != each]:
                what = f"{token!r} is part of {longer[0]!r}: programs would differ in which they find in a text"
            if what:
                problems.append(_problem(loaded.origins, key, what, hint))
    if not named or kind == "full":
        return problems
    if not ADAPTER_KINDS[kind].token_rows:
        title = ADAPTER_KINDS[kind].title
        what = f"new tokens are to be learned, but PEFT's {title} has no place for rows of an embedding"
        able = any_of([*(name for name, each in ADAPTER_KINDS.items() if each.token_rows), "full"])
        problems += [_problem(loaded.origins, key, what, f"set adapter.kind to {able}") for key in named]
    return problems


def _objective_problems(loaded: LoadedConfig) -> Iterator[Problem]:
    """Settings that the objective has no use for, or that say otherwise than it."""
    config, origins = loaded.config, loaded.origins
    training, judged = config.training, config.judge
    leave = "leave it out"
    if training.objective == "sft":
        if training.dpo_beta != default_of("training.dpo_beta") and origins["training.dpo_beta"] != "profile":
            what = f"dpo_beta is {training.dpo_beta:g}, but objective is sft, which has none"
            yield _problem(origins, "training.dpo_beta", what, "set training.objective to dpo, or leave it out")
        if sides := [name for name in ("chosen", "rejected") if name in (config.data.columns or {})]:
            what = f"data.columns names {' and '.join(sides)}, but objective is sft, which learns from single answers"
            yield _problem(origins, "data.columns", what, "set training.objective to dpo, or name a completion")
        return
    if config.data.rehearsal is not None:
        what = "data.rehearsal names rows to learn, but objective is dpo, which learns from pairs"
        hint = "leave it out: dpo_beta holds the model to what it was"
        yield _problem(origins, "data.rehearsal", what, hint)
    if config.template.train_on != "last" and origins["template.train_on"] not in ("default", "profile"):
        what = f"train_on is {config.template.train_on}, but objective is dpo, which compares the last answers"
        yield _problem(origins, "template.train_on", what, leave)
    if training.label_smoothing >= 0.5:
        what = f"label_smoothing is {training.label_smoothing:g}: half of the pairs would be the wrong way round"
        yield _problem(origins, "training.label_smoothing", what, "set it below 0.5")
    for key, value, only in (
        ("answers", judged.answers == "exact", "exact: no answer of a pair is the one right wording"),
        ("goal", judged.goal != "auto", f"{judged.goal}: it is judged whether pairs are told apart"),
    ):
        if value:
            yield _problem(origins, f"judge.{key}", f"objective is dpo, and {key} is {only}", leave)


def _quantize_problems(loaded: LoadedConfig) -> Iterator[Problem]:
    """What a quantised base cannot be trained with, or a size of groups that nothing is quantised in."""
    config, origins, quantize = loaded.config, loaded.origins, loaded.config.model.quantize
    size = config.model.quantize_group_size
    key = "model.quantize_group_size"
    if quantize is None and size != default_of(key) and origins[key] != "profile":
        what = f"quantize_group_size is {size}, but nothing is quantised: quantize is not set"
        yield _problem(origins, key, what, "set model.quantize as well, or leave it out")
    words = ABILITIES[config.backend].schemes
    if quantize is not None and quantize not in words:
        able = f"quantises by {' or '.join(words)}" if words else "trains on full weights only"
        others = " or ".join(name for name, able in ABILITIES.items() if quantize in able.schemes)
        what = f"quantize is {quantize}, but the {config.backend} backend {able}"
        yield _problem(origins, "model.quantize", what, f"set backend: {others}, which can, or leave it out")
    if quantize is not None and config.adapter.kind == "full":
        what = f"quantize is {quantize}, but adapter.kind is full: what is quantised cannot be trained"
        yield _problem(origins, "model.quantize", what, f"set adapter.kind to {any_of()}, or leave it out")
