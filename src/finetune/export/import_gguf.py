"""Makes an ordinary model folder out of a GGUF file; the folder appears only once it says the same as the file.

The inverse of `gguf`: what is written here is read again by the exporter, and held to the file key by key.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune.chat.encoder import Encoder
from finetune.chat.sandbox import compile_template
from finetune.chat.tokenizer import FileTokenizer
from finetune.errors import (
    EvidenceError,
    ExportError,
    MissingExtraError,
    OutputError,
    TemplateError,
    install_line,
)
from finetune.export.by_name import LoadedTokenizer, control_ids
from finetune.export.corpus import nasty_texts
from finetune.export.families import from_gguf_layout, to_gguf_layout
from finetune.export.gguf import Teller
from finetune.export.gguf_source import describe_folder
from finetune.export.import_config import ImportPlan, plan_import
from finetune.export.import_tokenizer import ImportedTokenizer, read_tokenizer
from finetune.export.llama_cpp import Answers, Questions, ask_llama_cpp
from finetune.export.merged_folder import older_names
from finetune.export.model_files import Dtype, ModelFiles
from finetune.export.pre_tokenizer import ASCII_ONLY
from finetune.export.read_back import Check, rounding
from finetune.export.sources import Files
from finetune.files import check_space, describe_files, file_hash, make_folder, write_folder
from finetune.models.gguf_file import GgufFile, read_gguf
from finetune.models.shape import weight_files
from finetune.records import Conversation, Message, ModelLocation
from finetune.report.card import CARD

Array = NDArray[Any]
_SIDE_BYTES = 64 << 20
_CONTEXT = 64
_ROUNDED: dict[Dtype, Literal["f32", "f16", "bf16"]] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_PATIENCE = 120
"""Seconds that llama.cpp may take for all of them."""
_TEXTS = 400
"""How many generated texts are cut here and by llama.cpp."""


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """A model folder that was written and examined."""

    path: Path
    source: Path
    kinds: dict[str, int]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "folder": str(self.path),
            "source": str(self.source),
            "tensors": self.kinds,
            "files": describe_files(self.path),
            "checks": [asdict(check) for check in self.checks],
            "notes": list(self.notes),
        }


class GgufWeights(Files):
    """The weights of a GGUF file under the names of transformers, in float32; one is in memory at a time."""

    def __init__(self, file: GgufFile, plan: ImportPlan) -> None:
        super().__init__(())
        self._gguf, self._plan = file, plan

    def names(self) -> Sequence[str]:
        """The names of all weights."""
        return list(self._plan.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one, as transformers stores it."""
        shape = self._gguf.tensors[self._plan.places[name]].shape
        # The layout of a weight that takes no memory tells the shape.
        return from_gguf_layout(self._plan.described, name, np.broadcast_to(np.float32(0), shape)).shape

    def kind(self, name: str) -> str:
        """Every weight becomes float32, which holds what any type of GGUF can."""
        return "F32"

    def size(self, name: str) -> int:
        """How many bytes one takes."""
        return int(np.prod(self.shape(name))) * 4

    def file(self, name: str) -> Path:
        """The file that holds it."""
        return self._gguf.path

    def read(self, name: str) -> Array:
        """One, in float32."""
        return from_gguf_layout(self._plan.described, name, self._gguf.read(self._plan.places[name]))

    def raw(self, name: str) -> bytes:
        """One, byte for byte as it is to be written."""
        return np.ascontiguousarray(self.read(name), "<f4").tobytes()


def import_gguf(
    source: Path, *, output: Path | None, dtype: Dtype | None = None, tell: Teller = lambda words: None
) -> ImportedModel:
    """Write a GGUF file's model as an ordinary Hugging Face model folder, and examine it.

    Args:
        output: the folder to make; by default in this one, named as the file.
        dtype: how weights are stored; None is float32, which loses nothing of the file.
        tell: receives progress messages.

    Raises:
        FineTuneError: the file cannot be read, the disk did not take the folder, or the folder does not say what the
            file does; in none of these cases is there a folder.
    """
    if find_spec("gguf") is None:
        raise MissingExtraError("reading GGUF needs gguf, which is not installed", hint=install_line("gguf"))
    path = output or Path(source.stem)
    if os.path.lexists(path):
        raise OutputError(f"{path} exists already", hint="remove it, or name another folder")
    file = read_gguf(source)
    plan = plan_import(file)
    tokenizer = read_tokenizer(file.metadata, plan.config["vocab_size"], plan.described.tried_context)
    weights = GgufWeights(file, plan)
    files = ModelFiles(weights, weights, None if dtype == "float32" else dtype)
    if tokenizer.template is not None:
        compile_template("tokenizer.chat_template", tokenizer.template)  # refuses what is not safe to read
    asked = _ask(file, tokenizer)
    make_folder(path.parent)
    check_space(path, files.total_bytes + _SIDE_BYTES, smaller="--dtype bfloat16")
    examined: list[Check] = []
    notes = [*plan.notes, *tokenizer.notes]

    def fill(folder: Path) -> None:
        tell(f"writing {len(weights.names())} weights of {files.total_bytes / 1e6:.1f} MB together")
        files.write(folder)
        for name, content in _side_files(file, plan, tokenizer, dtype or "float32").items():
            (folder / name).write_bytes(content)
        tell("reading the folder again")
        examined.append(_require_passed(_compare_weights(file, plan, folder, _ROUNDED[dtype or "float32"])))
        examined.append(_require_passed(_compare_settings(plan, folder, notes)))
        loaded = _as_loaded(file, tokenizer, notes)
        examined.extend(_require_passed(check) for check in _compare_ids(asked, FileTokenizer(folder), loaded, notes))

    write_folder(path, fill)
    kinds = [tensor.kind.lower() for tensor in file.tensors.values()]
    return ImportedModel(
        path, source, {kind: kinds.count(kind) for kind in sorted({*kinds})}, tuple(examined), tuple(notes)
    )


def _side_files(file: GgufFile, plan: ImportPlan, tokenizer: ImportedTokenizer, dtype: Dtype) -> dict[str, bytes]:
    """The content of each file beside the weights, by its name."""
    config = plan.config | {**tokenizer.ids, "dtype": dtype}
    generation = {key: value for key, value in tokenizer.ids.items() if value is not None}
    told: dict[str, Any] = {
        "config.json": config | older_names(config),
        "generation_config.json": generation,
        "tokenizer.json": tokenizer.file,
        "tokenizer_config.json": tokenizer.settings,
    }
    files = {name: (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode() for name, value in told.items()}
    if tokenizer.template is not None:
        files["chat_template.jinja"] = tokenizer.template.encode()
    return files | {CARD: _card(file, dtype).encode()}


def _card(file: GgufFile, dtype: str) -> str:
    """The model card: what the file says of who made the model and under which licence."""
    said = {key: value for key, value in file.metadata.items() if isinstance(value, str)}
    title = re.sub(r"\s+", " ", said.get("general.name") or file.path.stem)[:200]
    licence = said.get("general.license", "")
    head = ["library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"license: {json.dumps(licence)}"] if licence else []
    told = ("organization", "author", "url", "repo_url", "description", "license.name", "license.link")
    lines = [f"- {key}: {json.dumps(said[f'general.{key}'][:2000])}" for key in told if said.get(f"general.{key}")]
    kinds = sorted({tensor.kind for tensor in file.tensors.values()})
    return "\n".join(
        [
            *("---", *head, "---", f"# {title}", ""),
            f"- Licence: `{licence}`."
            if licence
            else "- The file names no licence: ask its makers before you pass this on.",
            *lines,
            f"- Made from `{file.path.name}`, SHA-256 `{file_hash(file.path)}`, whose weights are kept as "
            f"{', '.join(kinds)}; here they are {dtype}.",
            "",
        ]
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """Texts, and how llama.cpp cuts them, once it has; None where it is not installed."""

    texts: Sequence[str]
    answers: Future[Answers] | None


def _ask(file: GgufFile, tokenizer: ImportedTokenizer) -> _Asked:
    """Let llama.cpp cut texts, in a process of its own, while the folder is written."""
    added = [token["content"] for token in tokenizer.file["added_tokens"]]
    form = "ASCII" if file.metadata.get("tokenizer.ggml.pre") in ASCII_ONLY else ""
    texts = nasty_texts(added, form)[:_TEXTS]
    if find_spec("xllamacpp") is None:
        return _Asked(texts, None)
    pool = ThreadPoolExecutor(1)
    answers = pool.submit(ask_llama_cpp, file.path, Questions(texts, [], [], 1, _CONTEXT, 0), timeout=_PATIENCE)
    pool.shutdown(wait=False)
    return _Asked(texts, answers)


def _compare_weights(file: GgufFile, plan: ImportPlan, folder: Path, outtype: Literal["f32", "f16", "bf16"]) -> Check:
    """Put each weight that was written back into GGUF's layout, by the exporter's own rule: it is the file's again."""
    found, first = Files(weight_files(folder)), ""
    if odd := sorted({*found.names()} ^ plan.places.keys()):
        first = f"{odd[0]} is {'missing' if odd[0] in plan.places else 'not wanted'}"
    # A gain that GGUF holds plus one is rounded once as one is taken away, and once as it is put back.
    shift = np.float32(2**-23 * plan.described.family.norm_offset)
    for name, place in {} if first else plan.places.items():
        wanted, back = file.read(place), to_gguf_layout(plan.described, name, found.read(name))
        if back.shape != wanted.shape:
            first = first or f"{place} is {back.shape}, not {wanted.shape}"
        elif not np.array_equal(back, wanted):
            over = ~(
                np.abs(back - wanted) <= rounding(wanted, outtype) + (shift if name.endswith("norm.weight") else 0)
            )
            if over.any():
                first = first or f"{place} is {back[over][0]:g} where the file has {wanted[over][0]:g}"
    return Check("weights", f"{len(plan.places)} weights", f"every weight what the file holds, in {outtype}", first)


def _compare_settings(plan: ImportPlan, folder: Path, notes: list[str]) -> Check:
    _, described = describe_folder(folder)
    odd = [key for key, value in plan.described.metadata.items() if described.metadata.get(key) != value]
    odd += [
        name for name, value in plan.described.extra.items() if not np.array_equal(described.extra.get(name, ()), value)
    ]
    tokenizer = FileTokenizer(folder)
    if tokenizer.chat_template is not None:
        try:
            encoder = Encoder(ModelLocation(str(folder), folder, "local"), "tokenizer", tokenizer)
            encoder.prompt_ids(Conversation((Message("user", "Hello"),), "import"))
        except TemplateError as error:
            notes.append(f"its own chat template cannot be used here ({error.message}); choose another with --template")
    return Check("settings", f"{len(described.metadata)} keys", "every key as in the file", next(iter(odd), ""))


def _as_loaded(file: GgufFile, tokenizer: ImportedTokenizer, notes: list[str]) -> LoadedTokenizer:
    """The tokenizer as llama.cpp has it, which takes some words for control tokens by their names."""
    texts: list[str] = file.metadata["tokenizer.ggml.tokens"]
    apart = {token["id"]: token["special"] for token in tokenizer.file["added_tokens"]}
    control = control_ids(texts, [apart.get(number, False) for number in range(len(texts))])
    if words := [texts[number] for number in sorted(control - apart.keys())]:
        notes.append(
            f"llama.cpp reads {', '.join(words[:5])} as control tokens in any text, by their names; here they are "
            "words of the vocabulary, as the file says"
        )
    return LoadedTokenizer(tokenizer.file, control, texts)


def _compare_ids(asked: _Asked, tokenizer: FileTokenizer, loaded: LoadedTokenizer, notes: list[str]) -> Iterator[Check]:
    """Texts cut here and by llama.cpp: as plain text, as markup, and with what is put around them."""
    if asked.answers is None:
        notes.append(f"token ids were not compared with llama.cpp's: {install_line('gguf')}")
        return
    try:
        answers = asked.answers.result()
    except EvidenceError as error:
        notes.append(f"token ids were not compared with llama.cpp's: {error.message}")
        return
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    first, right = "", 0
    for place, text in enumerate(asked.texts):
        own = loaded.plain(text)
        pairs = (
            (own, answers.plain[place]),
            (loaded.markup(text), answers.markup[place]),
            ([*bos, *own], answers.around[place]),
        )
        same = [list(ours) == list(theirs) for ours, theirs in pairs]
        right += sum(same)
        if not first and not all(same):
            ours, theirs = pairs[same.index(False)]
            first = f"{text[:60]!r} is {list(ours)[:12]} here and {list(theirs)[:12]} in llama.cpp"
    yield Check("token ids", f"{right} of {3 * len(asked.texts)} equal", "all as llama.cpp cuts the texts", first)


def _require_passed(check: Check) -> Check:
    if not check.passed:
        raise ExportError(
            f"the folder was written, but at the stage {check.stage!r} it is not what the file says: {check.first}; "
            "nothing is left of it",
            hint="this is a fault of FineTune, or the file is odd: please report it with the file's name",
        )
    return check
