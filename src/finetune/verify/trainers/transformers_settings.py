"""Settings by our names in those of transformers and PEFT, and what a trainer is made of: runs in their environment."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from serving import RefusesError, UnsupportedError

Given = Mapping[str, Any]
IGNORED = -100
ARGUMENTS = {
    "training.epochs": "num_train_epochs",
    "training.max_steps": "max_steps",
    "training.batch_size": "per_device_train_batch_size",
    "training.gradient_accumulation_steps": "gradient_accumulation_steps",
    "training.learning_rate": "learning_rate",
    "training.schedule": "lr_scheduler_type",
    "training.warmup_fraction": "warmup_steps",
    "training.weight_decay": "weight_decay",
    "training.max_grad_norm": "max_grad_norm",
    "training.seed": "seed",
    "training.save_every": "save_steps",
}
ADAPTER = {
    "adapter.rank": "r",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.target_modules": "target_modules",
    "adapter.rank_pattern": "rank_pattern",
    "adapter.alpha_pattern": "alpha_pattern",
    "adapter.modules_to_save": "modules_to_save",
}
_READ_ELSEWHERE = ("template.name", "model.dtype", "evaluation.max_new_tokens", "adapter.kind", "adapter.scaling")
_LACKS: Mapping[str, tuple[Any, str]] = {
    "tokens.truncation": (None, "it has one way only: a row is cut at its end"),
    "tokens.cache": (None, "it has no such cache"),
    "training.loraplus_lr_ratio": (1.0, "its optimizer has one learning rate for all"),
    "training.processes": (1, "this subject opens one process"),
    "training.evaluate_every": (None, "this subject trains without held-out rows"),
    "training.early_stopping_patience": (None, "this subject trains without held-out rows"),
    "training.early_stopping_min_delta": (0.0, "this subject trains without held-out rows"),
    "training.load_best_model": (False, "this subject trains without held-out rows"),
    "training.packing": (False, "it does not pack"),
    "model.quantize": (None, "this subject opens models as they are"),
    "model.quantize_group_size": (64, "this subject opens models as they are"),
    "model.device": ("cpu", "this subject computes on the processor"),
    "data.limit": (None, "it takes all rows that it is given"),
    "data.valid_fraction": (0.0, "it holds no rows out"),
    "judge.control": ("never", "it judges nothing"),
    "judge.memory": ("never", "it judges nothing"),
    "evaluation.questions": (0, "it asks no questions"),
    "evaluation.retention_questions": (0, "it asks no questions"),
}
"""Settings that it has nothing like, each with the value that changes nothing, and why."""


@dataclass(frozen=True)
class Kind:
    """What one trainer has of its own.

    Attributes:
        name: what it is called.
        packages: those whose versions decide what it does.
        arguments: makes its configuration from keyword arguments.
        build: makes the trainer.
        has: its own arguments by our names, beside those that all have.
    """

    name: str
    packages: tuple[str, ...]
    arguments: Callable[..., Any]
    build: Callable[["TrainerInputs"], Any]
    has: Mapping[str, str]


@dataclass(frozen=True)
class TrainerInputs:
    """What a trainer is made of: rows as data files have them, or those that are ids and labels already."""

    model: Any
    tokenizer: Any
    arguments: Any
    adapter: Any
    settings: Given
    train: Sequence[Given]
    held_out: Sequence[Given] | None = None


def arguments_of(kind: Kind, settings: Given, folder: str, eval_batch: int | None = None) -> Any:
    """Its own configuration; a setting of a name that nobody knows is handed on to it as it is."""
    known = {**ARGUMENTS, **kind.has}
    own: dict[str, Any] = {
        "output_dir": folder,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "steps" if settings.get("training.save_every") else "no",
        "bf16": settings.get("model.dtype") == "bfloat16",
    }
    if eval_batch is not None:
        own["per_device_eval_batch_size"] = min(eval_batch, settings.get("training.batch_size", eval_batch))
    for name, value in settings.items():
        if name in known:
            if value is not None:
                own[known[name]] = value
        elif name in _LACKS:
            neutral, why = _LACKS[name]
            if value != neutral:
                raise UnsupportedError(f"{name}: {value!r}: {why}")
        elif name not in (*ADAPTER, *_READ_ELSEWHERE):
            own[name.rpartition(".")[2]] = value
    if own.get("warmup_steps") and own.get("lr_scheduler_type") == "constant":
        own["lr_scheduler_type"] = "constant_with_warmup"
    if own.get("warmup_steps") == 1.0:
        raise UnsupportedError("training.warmup_fraction: 1.0: it takes a share below 1, or a number of steps")
    try:
        return kind.arguments(**own)
    except (TypeError, ValueError) as error:
        raise RefusesError(f"{type(error).__name__}: {error}") from error


def adapter_of(settings: Given) -> Any:
    """PEFT's configuration of an adapter for these settings; all linear layers, where they do not say which."""
    kind = settings.get("adapter.kind", "lora")
    if kind not in ("lora", "dora"):
        raise UnsupportedError(f"adapter.kind: {kind!r}: this subject trains adapters")
    own = {ADAPTER[name]: value for name, value in settings.items() if name in ADAPTER and value is not None}
    own.setdefault("target_modules", "all-linear")
    rank_stabilized = settings.get("adapter.scaling") == "rank_stabilized"
    try:
        return peft.LoraConfig(task_type="CAUSAL_LM", use_dora=kind == "dora", use_rslora=rank_stabilized, **own)
    except (TypeError, ValueError) as error:
        raise RefusesError(f"{type(error).__name__}: {error}") from error


def tokenizer_of(model: str, settings: Given) -> Any:
    """A model's tokenizer, where its template is the one that is asked for."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    name = settings.get("template.name", "tokenizer")
    own = tokenizer.chat_template or ""
    if name != "tokenizer" and not (name == "chatml" and "<|im_start|>" in own):
        raise UnsupportedError(f"template.name: {name!r}: it takes the tokenizer's own template")
    return tokenizer


def network_of(model: str, settings: Given) -> Any:
    """A model as it is in its folder."""
    dtype = getattr(torch, settings.get("model.dtype") or "float32")
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


def adapted(network: object, adapter: str | None) -> Any:
    """A model with a saved adapter, where one is given."""
    return network if adapter is None else peft.PeftModel.from_pretrained(network, adapter)
