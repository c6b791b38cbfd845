"""What trainers that are built on transformers' own have in common, seen from the door: runs in their environment.

Everything goes through the trainer itself: its preparation of rows, its collator, its loss and its loop. What is asked
for is read off on the way, and nothing is computed here that the trainer computes.
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file
from serving import RefusesError, UnsupportedError, serve

Given = Mapping[str, Any]
IGNORED = -100
_ARGUMENTS = {
    "training.epochs": "num_train_epochs",
    "training.max_steps": "max_steps",
    "training.batch_size": "per_device_train_batch_size",
    "training.accumulation": "gradient_accumulation_steps",
    "training.learning_rate": "learning_rate",
    "training.schedule": "lr_scheduler_type",
    "training.warmup_fraction": "warmup_steps",
    "training.weight_decay": "weight_decay",
    "training.max_grad_norm": "max_grad_norm",
    "training.seed": "seed",
    "training.save_every": "save_steps",
}
_ADAPTER = {
    "adapter.rank": "r",
    "adapter.alpha": "lora_alpha",
    "adapter.dropout": "lora_dropout",
    "adapter.targets": "target_modules",
    "adapter.rank_pattern": "rank_pattern",
    "adapter.alpha_pattern": "alpha_pattern",
    "adapter.modules_to_save": "modules_to_save",
}
_READ_ELSEWHERE = ("template.name", "model.dtype", "evaluation.max_new_tokens", "adapter.kind", "adapter.scaling")
_LACKS: Mapping[str, tuple[Any, str]] = {
    "tokens.overlong": (None, "it has one way only: a row is cut at its end"),
    "tokens.cache": (None, "it has no such cache"),
    "training.lora_plus_ratio": (1.0, "its optimizer has one learning rate for all"),
    "training.processes": (1, "this door opens one process"),
    "training.evaluate_every": (None, "this door trains without held-out rows"),
    "training.stop_after": (None, "this door trains without held-out rows"),
    "training.stop_margin": (0.0, "this door trains without held-out rows"),
    "training.keep": ("last", "this door trains without held-out rows"),
    "training.packing": (False, "it does not pack"),
    "model.quantize": (None, "this door opens models as they are"),
    "model.quantize_group_size": (64, "this door opens models as they are"),
    "model.device": ("cpu", "this door computes on the processor"),
    "data.limit": (None, "it takes all rows that it is given"),
    "data.valid_fraction": (0.0, "it holds no rows out"),
    "judge.sham": ("never", "it judges nothing"),
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
    build: Callable[["Job"], Any]
    has: Mapping[str, str]


@dataclass(frozen=True)
class Job:
    """What a trainer is made of: rows as data files have them, or those that are ids and labels already."""

    model: Any
    tokenizer: Any
    arguments: Any
    adapter: Any
    settings: Given
    train: Sequence[Given]
    held_out: Sequence[Given] | None = None


class TransformersSide:
    """The handlers of all questions."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        transformers.utils.logging.disable_progress_bar()

    def serve(self) -> None:
        """Answer until there are no more questions."""
        abilities = (
            "configure", "render", "tokenize", "batches", "loss", "gradient", "train", "resume", "evaluate",
            "initial_adapter", "adapter_weights", "logits", "generate", "merge",
        )  # fmt: skip
        handlers = {ability: getattr(self, ability) for ability in abilities}
        missing = {"export": "it writes no GGUF files"}
        versions = {package: version(package) for package in self.kind.packages}
        serve(self.kind.name, versions, handlers, missing=missing, refusals=(RefusesError,))

    def configure(self, model: str, settings: Given) -> dict[str, Any]:
        """What its own configuration takes, and reads back."""
        arguments, adapter = self._arguments(settings, self._folder()), self._adapter(settings)
        _tokenizer(model, settings)
        found = {name: getattr(arguments, own) for name, own in {**_ARGUMENTS, **self.kind.has}.items()}
        found |= {name: getattr(adapter, own) for name, own in _ADAPTER.items()}
        return {"told": "", "effective": json.loads(json.dumps(found, default=_plain))}

    def render(self, model: str, settings: Given, messages: Sequence[Given], *, prompt: bool) -> dict[str, Any]:
        """What the tokenizer's own template makes of a conversation."""
        tokenizer = _tokenizer(model, settings)
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        except Exception as error:
            raise RefusesError(f"{type(error).__name__}: {error}") from error
        return {"text": text}

    def tokenize(self, model: str, settings: Given, rows: Sequence[Given]) -> dict[str, Any]:
        """The rows of its training data set, as it has prepared them."""
        if settings.get("training.packing"):
            raise UnsupportedError("packed sequences do not say which row they are of")
        trainer = self._trainer(model, settings, rows)
        found = [
            {"row": row["row"], "ids": list(row["input_ids"]), "targets": [label != IGNORED for label in row["labels"]]}
            for row in trainer.train_dataset
        ]
        left = len({row["row"] for row in found})
        return {"rows": found, "dropped": {"left out in preparation": len(rows) - left} if left < len(rows) else {}}

    def batches(self, model: str, settings: Given, rows: Sequence[Given], epochs: int) -> dict[str, Any]:
        """What its loop gives to a training step; the step itself computes nothing."""
        given = {**settings, "training.epochs": float(epochs), "training.max_steps": None}
        trainer = self._trainer(model, given, rows)
        seen = _Seen()
        trainer.add_callback(seen)

        def step(model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            seen.micro.append(_micro(inputs))
            return torch.zeros(())

        trainer.training_step = step
        trainer.train()
        return {"epochs": seen.epochs}

    def loss(self, model: str, settings: Given, batch: Sequence[Given], adapter: str | None = None) -> dict[str, Any]:
        """What it evaluates one batch to."""
        rows = _labelled(batch)
        trainer = self._trainer(model, settings, rows, held_out=rows, adapter=adapter)
        return {"loss": trainer.evaluate()["eval_loss"]}

    def gradient(self, model: str, settings: Given, micro: Sequence[Sequence[Given]]) -> dict[str, Any]:
        """The gradient of its first step, where its loop gets these micro-batches."""
        given = {**settings, "training.accumulation": len(micro), "training.max_steps": 1, "training.max_grad_norm": 0}
        trainer = self._trainer(model, given, [row for batch in micro for row in _labelled(batch)])
        seen = _Seen()
        trainer.add_callback(seen)
        batches = [_labelled(batch) for batch in micro]
        loader = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=trainer.data_collator)
        prepared = trainer.accelerator.prepare(loader)
        trainer.get_train_dataloader = lambda: prepared
        trainer.train()
        return {"norms": seen.norms, "loss": _steps(trainer)[0]["loss"]}

    def train(
        self, model: str, settings: Given, rows: Sequence[Given], folder: str, stop_after: int | None = None
    ) -> dict[str, Any]:
        """A run; with `stop_after` it ends, as by Ctrl-C, when the checkpoint of this step is there."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        asked = {"model": model, "settings": dict(settings), "rows": list(rows)}
        (place / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
        return self._course(self._trainer(model, settings, rows, place), place, stop_after, resume=False)

    def resume(self, folder: str, stop_after: int | None = None, settings: Given | None = None) -> dict[str, Any]:
        """Go on from the newest checkpoint."""
        place = Path(folder)
        asked = json.loads((place / "asked.json").read_text(encoding="utf-8"))
        trainer = self._trainer(asked["model"], {**asked["settings"], **(settings or {})}, asked["rows"], place)
        return self._course(trainer, place, stop_after, resume=True)

    def evaluate(
        self, model: str, settings: Given, rows: Sequence[Given], adapter: str | None = None
    ) -> dict[str, Any]:
        """What it evaluates held-out rows to."""
        trainer = self._trainer(model, settings, rows, held_out=rows, adapter=adapter)
        return {"loss": trainer.evaluate()["eval_loss"]}

    def initial_adapter(self, model: str, settings: Given) -> dict[str, Any]:
        """The adapter as it is before the first step."""
        trainer = self._trainer(model, settings, [{"prompt": "a", "completion": "b"}])
        folder = self._folder()
        trainer.save_model(folder)
        return self.adapter_weights(model, folder)

    def adapter_weights(self, model: str, adapter: str) -> dict[str, Any]:
        """An adapter's folder is in PEFT's own format."""
        config = peft.LoraConfig.from_pretrained(adapter)
        scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        return {"file": str(Path(adapter) / "adapter_model.safetensors"), "scale": scale}

    def logits(
        self, model: str, settings: Given, prompts: Sequence[Sequence[int]], adapter: str | None = None
    ) -> dict[str, Any]:
        """What the model computes, with an adapter where one is given."""
        network = _adapted(_network(model, settings), adapter).eval()
        with torch.no_grad():
            found = {
                str(place): network(input_ids=torch.tensor([list(ids)])).logits[0].float().contiguous()
                for place, ids in enumerate(prompts)
            }
        file = Path(self._folder()) / "logits.safetensors"
        save_file(found, file)
        return {"file": str(file)}

    def generate(
        self, model: str, settings: Given, prompts: Sequence[Sequence[int]], adapter: str | None = None
    ) -> dict[str, Any]:
        """What transformers generates greedily, one prompt after the other."""
        network = _adapted(_network(model, settings), adapter).eval()
        most = settings.get("evaluation.max_new_tokens", 32)
        ends = network.generation_config.eos_token_id
        stops = {ends} if isinstance(ends, int) else set(ends or ())
        answers = []
        for ids in prompts:
            asked = torch.tensor([list(ids)])
            whole = network.generate(
                input_ids=asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=most
            )
            said = whole[0, len(ids) :].tolist()
            answers.append(said[:-1] if said and said[-1] in stops else said)
        return {"answers": answers}

    def merge(self, model: str, settings: Given, adapter: str, folder: str) -> dict[str, Any]:
        """PEFT's merge, saved with its tokenizer."""
        merged = _adapted(_network(model, settings), adapter).merge_and_unload()
        merged.save_pretrained(folder)
        _tokenizer(model, settings).save_pretrained(folder)
        return {"folder": folder}

    def _folder(self) -> str:
        return tempfile.mkdtemp(dir=Path.cwd())

    def _trainer(
        self,
        model: str,
        settings: Given,
        rows: Sequence[Given],
        place: Path | None = None,
        *,
        held_out: Sequence[Given] | None = None,
        adapter: str | None = None,
    ) -> Any:
        arguments = self._arguments(settings, str(place or self._folder()), None if held_out is None else len(held_out))
        # An adapter's first weights come from the seed, as in a program that begins with `set_seed`.
        transformers.set_seed(arguments.seed)
        network, wrap = _network(model, settings), self._adapter(settings)
        if adapter is not None:
            network, wrap = _adapted(network, adapter), None
        elif held_out is not None:
            wrap = None
        job = Job(network, _tokenizer(model, settings), arguments, wrap, settings, rows, held_out)
        try:
            return self.kind.build(job)
        except (TypeError, ValueError) as error:
            raise RefusesError(f"{type(error).__name__}: {error}") from error

    def _arguments(self, settings: Given, folder: str, eval_batch: int | None = None) -> Any:
        """Its own configuration; a setting of a name that nobody knows is handed on to it as it is."""
        known = {**_ARGUMENTS, **self.kind.has}
        own: dict[str, Any] = {
            "output_dir": folder, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
            "save_strategy": "steps" if settings.get("training.save_every") else "no",
            "bf16": settings.get("model.dtype") == "bfloat16",
        }  # fmt: skip
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
            elif name not in (*_ADAPTER, *_READ_ELSEWHERE):
                own[name.rpartition(".")[2]] = value
        if own.get("warmup_steps") and own.get("lr_scheduler_type") == "constant":
            own["lr_scheduler_type"] = "constant_with_warmup"
        if own.get("warmup_steps") == 1.0:
            raise UnsupportedError("training.warmup_fraction: 1.0: it takes a share below 1, or a number of steps")
        try:
            return self.kind.arguments(**own)
        except (TypeError, ValueError) as error:
            raise RefusesError(f"{type(error).__name__}: {error}") from error

    def _adapter(self, settings: Given) -> Any:
        kind = settings.get("adapter.kind", "lora")
        if kind not in ("lora", "dora"):
            raise UnsupportedError(f"adapter.kind: {kind!r}: this door trains adapters")
        own = {_ADAPTER[name]: value for name, value in settings.items() if name in _ADAPTER and value is not None}
        own.setdefault("target_modules", "all-linear")
        rank_stabilized = settings.get("adapter.scaling") == "rank_stabilized"
        try:
            return peft.LoraConfig(task_type="CAUSAL_LM", use_dora=kind == "dora", use_rslora=rank_stabilized, **own)
        except (TypeError, ValueError) as error:
            raise RefusesError(f"{type(error).__name__}: {error}") from error

    def _course(self, trainer: Any, place: Path, stop_after: int | None, *, resume: bool) -> dict[str, Any]:
        trainer.add_callback(_Stop(stop_after))
        began = _last_step(place) if resume else 0
        if resume and not began:
            raise RefusesError("there is no checkpoint to go on from")
        adapter = None
        with suppress(_StoppedError):
            trainer.train(resume_from_checkpoint=True if resume else None)
            adapter = str(place / "adapter")
            trainer.save_model(adapter)
        kept = {path.name.rpartition("-")[2]: str(path) for path in place.glob("checkpoint-*")}
        steps = [step for step in _steps(trainer) if step["step"] > began]
        return {"steps": steps, "adapter": adapter, "checkpoints": kept}


class _StoppedError(Exception):
    """Training ends here."""


class _Stop(transformers.TrainerCallback):  # type: ignore[misc]
    """Ends training at once when the checkpoint of a step has been written."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After a checkpoint was written."""
        if state.global_step == self.step:
            raise _StoppedError


class _Seen(transformers.TrainerCallback):  # type: ignore[misc]
    """What went by: the micro-batches of each step and epoch, and the gradient before the weights move."""

    def __init__(self) -> None:
        self.micro: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.epochs: list[list[dict[str, Any]]] = []
        self.norms: dict[str, float] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Before the weights move."""
        self.norms = {
            name.replace(".default", ""): weight.grad.norm().item()
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After an optimizer step."""
        self.steps.append({"micro": self.micro})
        self.micro = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After an epoch."""
        self.epochs.append(self.steps)
        self.steps = []


def _tokenizer(model: str, settings: Given) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    name = settings.get("template.name", "tokenizer")
    own = tokenizer.chat_template or ""
    if name != "tokenizer" and not (name == "chatml" and "<|im_start|>" in own):
        raise UnsupportedError(f"template.name: {name!r}: it takes the tokenizer's own template")
    return tokenizer


def _network(model: str, settings: Given) -> Any:
    dtype = getattr(torch, settings.get("model.dtype") or "float32")
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


def _adapted(network: Any, adapter: str | None) -> Any:
    return network if adapter is None else peft.PeftModel.from_pretrained(network, adapter)


def _labelled(batch: Sequence[Given]) -> list[dict[str, Any]]:
    """Rows of ids with labels, as a data set has them that was prepared before."""
    return [
        {
            "input_ids": list(row["ids"]),
            "labels": [token if target else IGNORED for token, target in zip(row["ids"], row["targets"], strict=True)],
        }
        for row in batch
    ]


def _micro(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A micro-batch as the model gets it."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    targets = labels != IGNORED
    targets[:, 0] = False
    told: dict[str, Any] = {"ids": ids.tolist(), "targets": targets.tolist()}
    mask = inputs.get("attention_mask")
    told["real"] = (torch.ones_like(ids) if mask is None else mask).bool().tolist()
    if "position_ids" in inputs:
        told["positions"] = inputs["position_ids"].tolist()
    if "seq_idx" in inputs:
        told["segments"] = inputs["seq_idx"].tolist()
    return told


def _steps(trainer: Any) -> list[dict[str, Any]]:
    return [
        {"step": entry["step"], "loss": entry["loss"], "learning_rate": entry.get("learning_rate")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _last_step(place: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in place.glob("checkpoint-*")), default=0)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))
