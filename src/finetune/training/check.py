"""Looks for everything that would stop a run, without loading a weight, and goes on after each problem."""

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from finetune.chat.encoder import Encoder
from finetune.chat.tokenizer import FileTokenizer
from finetune.config import LoadedConfig, ModelAndDataFacts, resolve
from finetune.data.shipped import FACTS
from finetune.errors import ConfigError, FineTuneError, Problem
from finetune.models.locate import locate_model
from finetune.training.prepare import Prepared, adapter_target, planned_shape, prepare
from finetune.training.rows import read_shaped

T = TypeVar("T")


def find_problems(loaded: LoadedConfig) -> tuple[list[Problem], Prepared | None]:
    """Every problem of model, adapter, data and template, each with its place, or else the run that could start."""
    with suppress(FineTuneError):  # what is good is read once
        return [], prepare(loaded)
    try:
        return [], prepare(loaded)
    except FineTuneError:  # each part is looked at by itself, so that all problems are told at once
        pass
    problems: list[Problem] = []
    config = loaded.config

    def attempt(where: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except ConfigError as error:
            problems.extend(error.problems)
        except FineTuneError as error:
            problems.append(Problem(error.message, where, error.hint))
        return None

    rows = 0
    data = config.data if config.data.train else config.data.model_copy(update={"train": FACTS})
    read = config.model_copy(update={"data": data})
    for key in ("train", "valid", "rehearsal", "retention"):
        if getattr(data, key) is not None:
            shaped = attempt(f"data.{key}", lambda key=key: read_shaped(read, key))  # type: ignore[misc]
            rows = len(shaped.examples) if shaped is not None and key == "train" else rows
    location = attempt("model.path", lambda: locate_model(config.model.path, revision=config.model.revision))
    if location is None:
        return problems, None
    shape = attempt("model.path", lambda: planned_shape(config, location))
    if shape is None:
        return problems, None
    attempt("adapter", lambda: adapter_target(config, shape))
    tokenizer = attempt("model.path", lambda: FileTokenizer(location.folder, config.tokens.learned))
    if tokenizer is not None and attempt("model.path", lambda: Encoder(location, "alpaca", tokenizer)) is not None:
        own = tokenizer.chat_template is not None
        plan = attempt("config", lambda: resolve(loaded, ModelAndDataFacts(shape.context_length, own, rows)))
        if plan is not None:
            attempt("template", lambda: Encoder.planned(location, plan.config.template, tokenizer))
    # Each part may be good; whether they are good together, only doing it shows.
    return problems, None if problems else attempt("data", lambda: prepare(loaded))
