"""Settings by our names in those of transformers and PEFT, and what a trainer is made of: runs in their environment."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from peer import LACKS, Given, adapter_kind, require_neutral, with_own_template
from serving import RefusesError, UnsupportedError

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
    "training.label_smoothing": "label_smoothing_factor",
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
        elif name in LACKS:
            require_neutral(name, value, LACKS)
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
    kind = adapter_kind(settings)
    own = {ADAPTER[name]: value for name, value in settings.items() if name in ADAPTER and value is not None}
    own.setdefault("target_modules", "all-linear")
    rank_stabilized = settings.get("adapter.scaling") == "rank_stabilized"
    try:
        return peft.LoraConfig(task_type="CAUSAL_LM", use_dora=kind == "dora", use_rslora=rank_stabilized, **own)
    except (TypeError, ValueError) as error:
        raise RefusesError(f"{type(error).__name__}: {error}") from error


def tokenizer_of(model: str, settings: Given) -> Any:
    """A model's tokenizer, where its template is the one that is asked for."""
    return with_own_template(transformers.AutoTokenizer.from_pretrained(model), settings)


def network_of(model: str, settings: Given) -> Any:
    """A model as it is in its folder."""
    dtype = getattr(torch, settings.get("model.dtype") or "float32")
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


def adapted(network: object, adapter: str | None) -> Any:
    """A model with a saved adapter, where one is given."""
    return network if adapter is None else peft.PeftModel.from_pretrained(network, adapter)
