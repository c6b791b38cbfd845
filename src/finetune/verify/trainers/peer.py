"""What the programs for other projects' trainers share; nothing of a framework's is needed here."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serving import RefusesError, UnsupportedError

Given = Mapping[str, Any]
Answer = dict[str, Any]
Prompts = Sequence[Sequence[int]]
_SHIPPED = "this subject opens models as they are"
LACKS: Mapping[str, tuple[Any, str]] = {
    "tokens.truncation": (None, "it has one way only: a row is cut at its end"),
    "tokens.cache": (None, "it has no such cache"),
    "training.loraplus_lr_ratio": (1.0, "its optimizer has one learning rate for all"),
    "training.processes": (1, "this subject opens one process"),
    "training.gradient_checkpointing": (False, "this subject does not ask for it"),
    "training.packing": (False, "it does not pack"),
    "training.evaluate_every": (None, "this subject trains without held-out rows"),
    "training.early_stopping_patience": (
        None,
        "it does not stop early here: this subject trains without held-out rows",
    ),
    "training.early_stopping_min_delta": (
        0.0,
        "it does not stop early here: this subject trains without held-out rows",
    ),
    "training.load_best_model": (False, "it keeps the last weights: this subject trains without held-out rows"),
    "model.quantize": (None, _SHIPPED),
    "model.quantize_group_size": (64, _SHIPPED),
    "model.device": ("cpu", "this subject computes on the processor"),
    "data.limit": (None, "it takes all rows that it is given"),
    "data.valid_fraction": (0.0, "it holds no rows out"),
    "judge.control": ("never", "it judges nothing"),
    "judge.memory": ("never", "it judges nothing"),
    "evaluation.questions": (0, "it asks no questions"),
    "evaluation.retention_questions": (0, "it asks no questions"),
}
"""Settings that these trainers have nothing like, each with the value that changes nothing, and why."""
MISSING = dict.fromkeys(("split", "unseen"), "this subject trains without held-out rows")


def require_neutral(name: str, value: object, lacks: Mapping[str, tuple[Any, str]]) -> None:
    """Say of a setting that a trainer lacks that it does, unless its value changes nothing."""
    neutral, why = lacks[name]
    if value != neutral:
        raise UnsupportedError(f"{name}: {value!r}: {why}")


def require_texts(rows: Sequence[Given]) -> None:
    """Say of rows whose messages hold parts in the place of texts that a trainer of texts reads none."""
    if any(isinstance(turn["content"], list) for row in rows for turn in row.get("messages", ())):
        raise UnsupportedError("it hands content in parts to the template as it is: parts are for models that see")


def adapter_kind(settings: Given) -> str:
    """The kind of adapter, of those that these trainers have."""
    kind: str = settings.get("adapter.kind", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedError(f"adapter.kind: {kind!r}: this subject trains adapters")
    return kind


def with_own_template(tokenizer: Any, settings: Given) -> Any:
    """The tokenizer, where its template is the one that is asked for."""
    name = settings.get("template.name", "tokenizer")
    if name != "tokenizer" and not (name == "chatml" and "<|im_start|>" in (tokenizer.chat_template or "")):
        raise UnsupportedError(f"template.name: {name!r}: it takes the tokenizer's own template")
    return tokenizer


def rendered(tokenizer: Any, messages: Sequence[Given], *, prompt: bool) -> Answer:
    """What the tokenizer's own template makes of a conversation."""
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:
        raise RefusesError(f"{type(error).__name__}: {error}") from error
    return {"text": text}


def prompt_ids(tokenizer: Any, messages: Sequence[Given]) -> Answer:
    """The ids of what the tokenizer's own template makes of a question."""
    return {"ids": list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))}


def without_end(ids: Sequence[int], stops: Sequence[int] | set[int]) -> list[int]:
    """An answer without what ended it."""
    return list(ids[:-1] if ids and ids[-1] in stops else ids)


def write_request(folder: str, model: str, settings: Given, rows: Sequence[Given]) -> Answer:
    """Keep in a run's folder what was asked for, for the day it is resumed."""
    request = {"model": model, "settings": dict(settings), "rows": list(rows)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "asked.json").write_text(json.dumps(request), encoding="utf-8")
    return request


def read_request(folder: str, settings: Given | None) -> Answer:
    """What was asked for when a run began, with the settings that are changed now."""
    request: dict[str, Any] = json.loads((Path(folder) / "asked.json").read_text(encoding="utf-8"))
    return {**request, "settings": {**request["settings"], **(settings or {})}}
