"""A run's result, or a model as it is, made ready for GGUF: its weights, tokenizer and names, and what to ask it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune.chat.tokenizer import FileTokenizer
from finetune.errors import MissingExtraError, install_line
from finetune.export.blueprint import plan_model
from finetune.export.by_name import end_ids
from finetune.export.families import Described, describe_model
from finetune.export.result import Result, open_result, plain_prompts, refuse_packed
from finetune.export.rounded import RoundingBounds
from finetune.export.sources import AdapterWeights, Files, Merged, WeightSource
from finetune.export.vocabulary import PHI3_NAMES, GgufVocabulary, Special, describe_vocabulary, serving_template
from finetune.models.locate import locate_model
from finetune.models.shape import read_config, read_shape, weight_files
from finetune.models.travel import hub_id
from finetune.ports import Backend, Session
from finetune.records import ModelLocation, ModelShape
from finetune.report.card import licence_in

_TABLES = ("embed_tokens.weight", "wte.weight")


@dataclass(frozen=True, slots=True)
class Exportable:
    """What can be written.

    `base` are the weights without an adapter, in `folder`; `open` gives the trainer's session in float32, and
    `open_plain` one on any folder's weights.
    """

    shape: ModelShape
    described: Described
    base: WeightSource
    adapter: AdapterWeights | None
    tokenizer: FileTokenizer
    template: str | None
    special: Special
    prompts: tuple[tuple[int, ...], ...]
    naming: Mapping[str, Any]
    folder: Path
    open: Callable[[], Session] = field(repr=False)
    open_plain: Callable[[Path], Session] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> WeightSource:
        """The weights with the adapter merged in."""
        return Merged(self.base, self.adapter, self.described.family.transposed) if self.adapter else self.base

    def bounds(self, session: Session, sequences: Sequence[Sequence[int]]) -> RoundingBounds:
        """How far other computations of it may be from this session, measured on these sequences."""
        adapted, transposed = self.adapter is not None, self.described.family.transposed
        return RoundingBounds(session, self.folder, adapted, sequences, self.open_plain, transposed)

    @property
    def rows(self) -> int:
        """How many rows the embedding table has."""
        return _rows(self.shape)


def exportable_run(path: Path, open_backend: Callable[[str], Backend]) -> Exportable:
    """What a finished run has trained.

    Raises:
        FineTuneError: the run is not finished, a file of it has changed, or the model cannot be written as GGUF.
    """
    return exportable_result(open_result(path, open_backend))


def exportable_result(result: Result) -> Exportable:
    """What a run that was opened has trained.

    Raises:
        FineTuneError: the model cannot be written as GGUF.
    """
    encoder = result.encoder
    shape, described = describe_folder(result.folder)
    return Exportable(
        shape,
        described,
        Files(weight_files(result.folder)),
        result.adapter(),
        encoder.tokenizer,
        encoder.source.jinja,
        _special(encoder.tokenizer, encoder.stop_ids),
        result.prompts(),
        _naming(result.location, result.manifest),
        result.folder,
        result.open,
        result.open_plain,
        result.quantized_notes,
    )


def exportable_model(name: str, open_backend: Callable[[], Backend]) -> Exportable:
    """A model as it is, by shipped name, local folder or hub id; its backend is opened when it is to compute.

    Raises:
        FineTuneError: it cannot be found, or not be written as GGUF.
    """
    location = locate_model(name)
    shape, described = describe_folder(location.folder)
    tokenizer = FileTokenizer(location.folder)
    return Exportable(
        shape,
        described,
        Files(weight_files(location.folder)),
        None,
        tokenizer,
        tokenizer.chat_template,
        _special(tokenizer, tokenizer.stop_ids),
        plain_prompts(tokenizer),
        _naming(location, None),
        location.folder,
        lambda: open_backend().open(location, "float32", tokenizer.pad_id),
        lambda folder: open_backend().open(replace(location, folder=folder), "float32", tokenizer.pad_id),
    )


def check_exportable(location: ModelLocation) -> None:
    """See, before anything is trained, that what is trained on this base can be written as GGUF.

    Raises:
        MissingExtraError: a library is missing.
        ModelError: its architecture, its weights or its tokenizer have no place in GGUF, or are quantised.
    """
    require_gguf()
    shape, described = describe_folder(location.folder)
    refuse_packed(shape, location)
    tokenizer = FileTokenizer(location.folder)
    special = _special(tokenizer, tokenizer.stop_ids)
    vocabulary = describe_vocabulary(tokenizer.description(), special, _rows(shape))
    plan_model(described, shape, Files(weight_files(location.folder)), vocabulary.metadata, "f32")


def require_gguf() -> None:
    """Refuse what needs libraries that are not installed.

    Raises:
        MissingExtraError: the extra to install is named.
    """
    if missing := [library for library in ("gguf", "xllamacpp") if find_spec(library) is None]:
        raise MissingExtraError(f"GGUF needs what is not installed: {', '.join(missing)}", hint=install_line("gguf"))


def file_metadata(exportable: Exportable, vocabulary: GgufVocabulary) -> dict[str, Any]:
    """The keys of the file beside those of the architecture: names, tokenizer, template."""
    keys = {**exportable.naming, **vocabulary.metadata}
    name = str(keys["general.name"])
    if vocabulary.needs_strip is not any(word in name.lower() for word in PHI3_NAMES):
        # By the model's name alone llama.cpp decides whether control tokens swallow the space after them.
        keys["general.name"] = f"phi-3 {name}" if vocabulary.needs_strip else name.lower().replace("phi", "phi ")
    if exportable.template is not None:
        keys["tokenizer.chat_template"] = serving_template(exportable.template, exportable.special)
    return keys


def all_stops(exportable: Exportable, vocabulary: GgufVocabulary) -> tuple[int, ...]:
    """The ids at which an answer ends, those at which llama.cpp stops by itself, for their names, among them."""
    named = end_ids(vocabulary.metadata["tokenizer.ggml.tokens"])
    return tuple(dict.fromkeys([*exportable.special.stops, *named]))


def describe_folder(folder: Path) -> tuple[ModelShape, Described]:
    """The shape of the model in a folder, and what GGUF says of it."""
    config = read_config(folder)
    shape = read_shape(folder)
    return shape, describe_model(config, tied=shape.tied_head, vocab_size=_rows(shape))


def _rows(shape: ModelShape) -> int:
    return next((sides[0] for name, sides in shape.weights.items() if name.endswith(_TABLES)), shape.vocab_size)


def _special(tokenizer: FileTokenizer, stops: tuple[int, ...]) -> Special:
    return Special(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, stops, tokenizer.adds_bos)


def _naming(location: ModelLocation, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the file says of where the model comes from: base model, data set, licence."""
    known = location.name if location.source == "hub" else hub_id(location.folder)
    name = known.rsplit("/", 1)[-1] or location.folder.name
    keys: dict[str, Any] = {"general.name": name}
    if named := licence_in(location.folder):
        keys["general.license"] = named
    if manifest is None:
        return keys
    keys |= {
        "general.name": f"{name}-{manifest['id']}",
        "general.basename": name,
        "general.finetune": str(manifest["id"]),
        "general.base_model.count": 1,
        "general.base_model.0.name": name,
    }
    if "/" in known:
        keys["general.base_model.0.organization"] = known.split("/")[0]
        keys["general.base_model.0.repo_url"] = f"https://huggingface.co/{known}"
    files = [str(file["path"]) for file in manifest["data"].get("files") or []]
    if files:
        keys["general.dataset.count"] = len(files)
        keys |= {f"general.dataset.{index}.name": Path(file).name for index, file in enumerate(files)}
    return keys
