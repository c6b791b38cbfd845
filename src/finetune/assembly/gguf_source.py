"""A run's result, or a model as it is, made ready for GGUF: its weights, tokenizer and names, and what to ask it."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.artifacts.run_folder import RunFolder
from finetune.assembly.saved import check_saved, open_encoder, open_tuned
from finetune.config import TrainingConfig, load_plan
from finetune.convert.families import Described, describe_model
from finetune.convert.sources import Adapter, Files, Merged, Source
from finetune.convert.vocabulary import Special
from finetune.errors import ModelError
from finetune.models.locate import locate_model
from finetune.models.peft_files import WEIGHTS, read_settings
from finetune.models.shape import read_shape, weight_files
from finetune.ports import Backend, Session
from finetune.records import Conversation, Message, ModelLocation, ModelShape
from finetune.tokens.tokenizer import FileTokenizer

MOST_QUESTIONS = 32
_PROMPTS = ("Hello", "The capital of France is", "1 2 3 4 5 6 7", "def main():\n    ", "a b c d e f g " * 100)
_TABLES = ("embed_tokens.weight", "wte.weight")


@dataclass(frozen=True, slots=True)
class Exportable:
    """What can be written: `base` are the weights without an adapter, `open` gives the trainer's session in float32."""

    shape: ModelShape
    described: Described
    base: Source
    adapter: Adapter | None
    tokenizer: FileTokenizer
    template: str | None
    special: Special
    prompts: tuple[tuple[int, ...], ...]
    naming: Mapping[str, Any]
    open: Callable[[], Session] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> Source:
        """The weights with the adapter merged in."""
        return Merged(self.base, self.adapter, self.described.family.turned) if self.adapter else self.base

    @property
    def rows(self) -> int:
        """How many rows the embedding table has."""
        return _rows(self.shape)


def exportable_run(path: Path, open_backend: Callable[[str], Backend]) -> Exportable:
    """What a finished run has trained.

    Raises:
        FineTuneError: the run is not finished, a file of it has changed, or the model cannot be written as GGUF.
    """
    folder = RunFolder.finished(path)
    config, manifest = load_plan(folder.plan).config, folder.read_manifest()
    location = locate_model(config.model.path, revision=config.model.revision)
    saved = check_saved(folder, config, location)
    whole = saved == folder.model
    encoder = open_encoder(folder, config, location)
    shape, described = _describe(saved if whole else location.folder)
    adapter = None
    if not whole:
        adapter = Adapter(saved / WEIGHTS, read_settings(saved, turned=bool(described.family.turned)))
    asked = ((manifest.get("scores") or {}).get("learning") or {}).get("tuned") or {"answers": []}
    questions = [answer["question"] for answer in asked["answers"][:MOST_QUESTIONS]]
    prompts = [encoder.prompt_ids(Conversation((Message("user", text),), "export")) for text in questions]

    def opener(place: ModelLocation) -> Session:
        backend = open_backend(config.backend)
        return backend.open(place, "float32", encoder.tokenizer.pad_id, device=config.model.device)

    return Exportable(
        shape,
        described,
        Files(weight_files(saved if whole else location.folder)),
        adapter,
        encoder.tokenizer,
        encoder.source.jinja,
        _special(encoder.tokenizer, encoder.stop_ids),
        (*prompts, *_plain_prompts(encoder.tokenizer)),
        _naming(location, manifest),
        lambda: open_tuned(folder, config, location, opener),
        _quantized_notes(config),
    )


def exportable_model(name: str, backend: Backend) -> Exportable:
    """A model as it is, by shipped name, local folder or hub id.

    Raises:
        FineTuneError: it cannot be found, or not be written as GGUF.
    """
    location = locate_model(name)
    shape, described = _describe(location.folder)
    tokenizer = FileTokenizer(location.folder)
    return Exportable(
        shape,
        described,
        Files(weight_files(location.folder)),
        None,
        tokenizer,
        tokenizer.chat_template,
        _special(tokenizer, tokenizer.stop_ids),
        _plain_prompts(tokenizer),
        _naming(location, None),
        lambda: backend.open(location, "float32", tokenizer.pad_id),
    )


def _quantized_notes(config: TrainingConfig) -> tuple[str, ...]:
    if config.model.quantize is None:
        return ()
    return (
        f"the adapter learned on a base that was quantised to {config.model.quantize} as it was loaded; the file holds "
        "the full base with that adapter, and is held to what the full base computes with it",
    )


def _describe(folder: Path) -> tuple[ModelShape, Described]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = read_shape(folder)
    return shape, describe_model(config, tied=shape.tied_head, vocab_size=_rows(shape))


def _rows(shape: ModelShape) -> int:
    return next((sides[0] for name, sides in shape.weights.items() if name.endswith(_TABLES)), shape.vocab_size)


def _special(tokenizer: FileTokenizer, stops: tuple[int, ...]) -> Special:
    return Special(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, stops, tokenizer.adds_bos)


def _plain_prompts(tokenizer: FileTokenizer) -> tuple[tuple[int, ...], ...]:
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return tuple((*bos, *tokenizer.encode_content(text)) for text in _PROMPTS)


def _naming(location: ModelLocation, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the file says of where the model comes from: base model, data set, licence."""
    name = location.name.rstrip("/").rsplit("/", 1)[-1]
    keys: dict[str, Any] = {"general.name": name}
    if licence := _licence(location.folder / "README.md"):
        keys["general.license"] = licence
    if manifest is None:
        return keys
    keys |= {
        "general.name": f"{name}-{manifest['id']}",
        "general.basename": name,
        "general.finetune": str(manifest["id"]),
        "general.base_model.count": 1,
        "general.base_model.0.name": name,
    }
    if location.source == "hub" and "/" in location.name:
        keys["general.base_model.0.organization"] = location.name.split("/")[0]
        keys["general.base_model.0.repo_url"] = f"https://huggingface.co/{location.name}"
    files = [str(file["path"]) for file in manifest["data"].get("files") or []]
    if files:
        keys["general.dataset.count"] = len(files)
        keys |= {f"general.dataset.{index}.name": Path(file).name for index, file in enumerate(files)}
    return keys


def _licence(card: Path) -> str:
    """The licence that a model card names at its head; empty where there is none."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    parts = text.split("---\n", 2)
    if not text.startswith("---\n") or len(parts) < 3:
        return ""
    try:
        head = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        raise ModelError(f"{card}: the head of the model card is no YAML: {error}", hint="mend it") from None
    licence = head.get("license") if isinstance(head, dict) else None
    return licence if isinstance(licence, str) else ""
