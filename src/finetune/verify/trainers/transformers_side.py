"""What trainers that are built on transformers' own have in common, seen from the suite: runs in their environment.

Everything goes through the trainer itself: its preparation of rows, its collator, its loss and its loop. What is asked
for is read off on the way, and nothing is computed here that the trainer computes.
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from jinja2 import TemplateError
from peer import MISSING, Answer, Prompts, prompt_ids, read_request, rendered, require_texts, without_end, write_request
from safetensors.torch import save_file
from serving import RefusesError, UnsupportedError, guarded, serve
from transformers_settings import (
    ADAPTER,
    ARGUMENTS,
    IGNORED,
    Given,
    Kind,
    TrainerInputs,
    adapted,
    adapter_of,
    arguments_of,
    network_of,
    tokenizer_of,
)


class TransformersSide:
    """The handlers of all questions."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        transformers.utils.logging.disable_progress_bar()

    def serve(self) -> None:
        """Answer until there are no more questions."""
        can: tuple[Callable[..., Any], ...] = (
            self.configure,
            self.render,
            self.prompt,
            self.stops,
            self.tokenize,
            self.batches,
            self.loss,
        )
        can += (self.gradient, self.train, self.resume, self.evaluate, self.initial_adapter, self.adapter_weights)
        can += (self.logits, self.generate, self.merge)
        handlers = {handler.__name__: handler for handler in can}
        missing = {**MISSING, "export": "it writes no GGUF files"}
        versions = {package: version(package) for package in self.kind.packages}
        serve(self.kind.name, versions, guarded(handlers, str(Path(__file__).parent)), missing=missing)

    def configure(self, model: str, settings: Given) -> Answer:
        """What its own configuration takes, and reads back."""
        arguments, adapter = arguments_of(self.kind, settings, self._folder()), adapter_of(settings)
        tokenizer_of(model, settings)
        found = {name: getattr(arguments, own) for name, own in {**ARGUMENTS, **self.kind.has}.items()}
        # Where it has another word for the same.
        found["training.max_steps"] = None if arguments.max_steps < 0 else arguments.max_steps
        for name in ("training.schedule", "training.save_every"):
            del found[name]
        found |= {name: getattr(adapter, own) for name, own in ADAPTER.items()}
        return {"told": "", "effective": json.loads(json.dumps(found, default=_plain))}

    def render(self, model: str, settings: Given, messages: Sequence[Given], *, prompt: bool) -> Answer:
        """What the tokenizer's own template makes of a conversation."""
        found: dict[str, Any] = rendered(tokenizer_of(model, settings), messages, prompt=prompt)
        return found

    def prompt(self, model: str, settings: Given, messages: Sequence[Given]) -> Answer:
        """The ids of what the tokenizer's own template makes of a question."""
        found: dict[str, Any] = prompt_ids(tokenizer_of(model, settings), messages)
        return found

    def stops(self, model: str, settings: Given) -> Answer:
        """What ends an answer when the model generates."""
        ends = network_of(model, settings).generation_config.eos_token_id
        return {"ids": [ends] if isinstance(ends, int) else list(ends or ())}

    def tokenize(self, model: str, settings: Given, rows: Sequence[Given]) -> Answer:
        """The rows of its training data set, as it has prepared them."""
        if settings.get("training.packing"):
            raise UnsupportedError("packed sequences do not say which row they are of")
        require_texts(rows)
        try:
            trainer = self._trainer(model, settings, rows)
        except TemplateError as error:
            raise UnsupportedError(f"a row that its template refuses ends its preparation: {error}") from error
        found = [
            {"row": row["row"], "ids": list(row["input_ids"]), "targets": [label != IGNORED for label in row["labels"]]}
            for row in trainer.train_dataset
        ]
        left = len({row["row"] for row in found})
        return {"rows": found, "dropped": {"left out in preparation": len(rows) - left} if left < len(rows) else {}}

    def batches(self, model: str, settings: Given, rows: Sequence[Given], epochs: int) -> Answer:
        """What its loop gives to a training step; the step itself computes nothing."""
        given = {**settings, "training.epochs": float(epochs), "training.max_steps": None}
        trainer = self._trainer(model, given, rows)
        seen = _StepRecorder()
        trainer.add_callback(seen)

        def step(model: object, inputs: Any, *_: object, **__: object) -> Any:
            seen.micro.append(_micro(inputs))
            return torch.zeros(())

        trainer.training_step = step
        trainer.train()
        return {"epochs": seen.epochs}

    def loss(self, model: str, settings: Given, batch: Sequence[Given], adapter: str | None = None) -> Answer:
        """What it evaluates one batch to."""
        rows = _labelled(batch)
        trainer = self._trainer(model, settings, rows, held_out=rows, adapter=adapter)
        return {"loss": trainer.evaluate()["eval_loss"]}

    def gradient(self, model: str, settings: Given, micro: Sequence[Sequence[Given]]) -> Answer:
        """The gradient of its first step, where its loop gets these micro-batches."""
        given = {
            **settings,
            "training.gradient_accumulation_steps": len(micro),
            "training.max_steps": 1,
            "training.max_grad_norm": 0,
        }
        trainer = self._trainer(model, given, [row for batch in micro for row in _labelled(batch)])
        seen = _StepRecorder()
        trainer.add_callback(seen)
        batches = [_labelled(batch) for batch in micro]
        loader = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=trainer.data_collator)
        prepared = trainer.accelerator.prepare(loader)
        trainer.get_train_dataloader = lambda: prepared
        trainer.train()
        return {"norms": seen.norms, "loss": _steps(trainer)[0]["loss"]}

    def train(
        self, model: str, settings: Given, rows: Sequence[Given], folder: str, stop_after: int | None = None
    ) -> Answer:
        """A run; with `stop_after` it ends, as by Ctrl-C, when the checkpoint of this step is there."""
        place = Path(folder)
        write_request(folder, model, settings, rows)
        return self._course(self._trainer(model, settings, rows, place), place, stop_after, resume=False)

    def resume(self, folder: str, stop_after: int | None = None, settings: Given | None = None) -> Answer:
        """Go on from the newest checkpoint."""
        place, request = Path(folder), read_request(folder, settings)
        trainer = self._trainer(request["model"], request["settings"], request["rows"], place)
        return self._course(trainer, place, stop_after, resume=True)

    def evaluate(self, model: str, settings: Given, rows: Sequence[Given], adapter: str | None = None) -> Answer:
        """What it evaluates held-out rows to."""
        trainer = self._trainer(model, settings, rows, held_out=rows, adapter=adapter)
        return {"loss": trainer.evaluate()["eval_loss"]}

    def initial_adapter(self, model: str, settings: Given) -> Answer:
        """The adapter as it is before the first step."""
        trainer = self._trainer(model, settings, [{"prompt": "a", "completion": "b"}])
        folder = self._folder()
        trainer.save_model(folder)
        return self.adapter_weights(model, folder)

    def adapter_weights(self, model: str, adapter: str) -> Answer:
        """An adapter's folder is in PEFT's own format."""
        config = peft.LoraConfig.from_pretrained(adapter)
        scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        return {"file": str(Path(adapter) / "adapter_model.safetensors"), "scale": scale}

    def logits(self, model: str, settings: Given, prompts: Prompts, adapter: str | None = None) -> Answer:
        """What the model computes, with an adapter where one is given."""
        network = adapted(network_of(model, settings), adapter).eval()
        with torch.no_grad():
            found = {
                str(place): network(input_ids=torch.tensor([list(ids)])).logits[0].float().contiguous()
                for place, ids in enumerate(prompts)
            }
        file = Path(self._folder()) / "logits.safetensors"
        save_file(found, file)
        return {"file": str(file)}

    def generate(self, model: str, settings: Given, prompts: Prompts, adapter: str | None = None) -> Answer:
        """What transformers generates greedily, one prompt after the other."""
        network = adapted(network_of(model, settings), adapter).eval()
        most = settings.get("evaluation.max_new_tokens", 32)
        ends = network.generation_config.eos_token_id
        stops = {ends} if isinstance(ends, int) else set(ends or ())
        answers = []
        for ids in prompts:
            prompt = torch.tensor([list(ids)])
            whole = network.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=most
            )
            answers.append(without_end(whole[0, len(ids) :].tolist(), stops))
        return {"answers": answers}

    def merge(self, model: str, settings: Given, adapter: str) -> Answer:
        """PEFT's merge, saved with its tokenizer."""
        folder = self._folder()
        merged = adapted(network_of(model, settings), adapter).merge_and_unload()
        merged.save_pretrained(folder)
        tokenizer_of(model, settings).save_pretrained(folder)
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
        arguments = arguments_of(
            self.kind, settings, str(place or self._folder()), None if held_out is None else len(held_out)
        )
        # An adapter's first weights come from the seed, as in a program that begins with `set_seed`.
        transformers.set_seed(arguments.seed)
        network, wrap = network_of(model, settings), adapter_of(settings)
        if adapter is not None:
            network, wrap = adapted(network, adapter), None
        elif held_out is not None:
            wrap = None
        job = TrainerInputs(network, tokenizer_of(model, settings), arguments, wrap, settings, rows, held_out)
        return self.kind.build(job)

    def _course(self, trainer: Any, place: Path, stop_after: int | None, *, resume: bool) -> Answer:
        trainer.add_callback(_Stop(stop_after))
        done = (int(path.name.rpartition("-")[2]) for path in place.glob("checkpoint-*"))
        began = max(done, default=0) if resume else 0
        if resume and not began:
            raise RefusesError("there is no checkpoint to go on from")
        adapter = None
        with suppress(_StoppedBySuiteError):
            trainer.train(resume_from_checkpoint=True if resume else None)
            adapter = str(place / "adapter")
            trainer.save_model(adapter)
        kept = {path.name.rpartition("-")[2]: str(path) for path in place.glob("checkpoint-*")}
        steps = [step for step in _steps(trainer) if step["step"] > began]
        return {"steps": steps, "adapter": adapter, "checkpoints": kept}


class _StoppedBySuiteError(Exception):
    """Training ends here."""


class _Stop(transformers.TrainerCallback):  # type: ignore[misc]
    """Ends training at once when the checkpoint of a step has been written."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_save(self, args: object, state: Any, control: object, **_: object) -> None:
        if state.global_step == self.step:
            raise _StoppedBySuiteError


class _StepRecorder(transformers.TrainerCallback):  # type: ignore[misc]
    """What went by: the micro-batches of each step and epoch, and the gradient before the weights move."""

    def __init__(self) -> None:
        self.micro: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []
        self.epochs: list[list[dict[str, Any]]] = []
        self.norms: dict[str, float] = {}

    def on_pre_optimizer_step(
        self, args: object, state: object, control: object, model: Any = None, **_: object
    ) -> None:
        """Before the weights move."""
        self.norms = {
            _in_files(name): weight.grad.norm().item()
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        self.steps.append({"micro": self.micro})
        self.micro = []

    def on_epoch_end(self, args: object, state: object, control: object, **_: object) -> None:
        self.epochs.append(self.steps)
        self.steps = []


def _labelled(batch: Sequence[Given]) -> list[dict[str, Any]]:
    """Rows of ids with labels, as a data set has them that was prepared before."""
    return [
        {
            "input_ids": list(row["ids"]),
            "labels": [token if target else IGNORED for token, target in zip(row["ids"], row["targets"], strict=True)],
        }
        for row in batch
    ]


def _micro(inputs: Mapping[str, Any]) -> Answer:
    """A micro-batch as the model gets it."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    targets = labels != IGNORED
    targets[:, 0] = False
    found: dict[str, Any] = {"ids": ids.tolist(), "targets": targets.tolist()}
    mask = inputs.get("attention_mask")
    found["real"] = (torch.ones_like(ids) if mask is None else mask).bool().tolist()
    if "position_ids" in inputs:
        found["positions"] = inputs["position_ids"].tolist()
    if "seq_idx" in inputs:
        found["segments"] = inputs["seq_idx"].tolist()
    return found


def _in_files(name: str) -> str:
    """What PEFT's files call a weight that it trains."""
    for within, filed in ((".modules_to_save", ""), (".default", ""), ("magnitude_vector.weight", "magnitude_vector")):
        name = name.replace(within, filed)
    return name


def _steps(trainer: Any) -> list[dict[str, Any]]:
    return [
        {"step": entry["step"], "loss": entry["loss"], "learning_rate": entry.get("learning_rate")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _plain(value: object) -> Any:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))
