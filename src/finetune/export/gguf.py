"""Writes a run's result, or a model, as GGUF; the file appears only once llama.cpp computes the same."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from finetune.abilities import require_backend
from finetune.backends import open_backend
from finetune.config import TrainingConfig
from finetune.errors import EvidenceError, ExportError, ModelError, OutputError
from finetune.export.blueprint import Blueprint, plan_adapter, plan_model
from finetune.export.by_name import CONTROL_BY_NAME, LoadedTokenizer
from finetune.export.corpus import nasty_texts
from finetune.export.gguf_check import BaselineModel, bound_of, compare, prepare_questions
from finetune.export.gguf_source import (
    Exportable,
    all_stops,
    check_exportable,
    exportable_model,
    exportable_run,
    file_metadata,
    require_gguf,
)
from finetune.export.llama_cpp import ask_llama_cpp
from finetune.export.outtypes import BLOCKS, QUANTISED, Outtype, Storage
from finetune.export.read_back import Check, keep_refused, read_back
from finetune.export.rounded import sight_notes
from finetune.export.vocabulary import GgufVocabulary, describe_vocabulary
from finetune.export.write import write_gguf
from finetune.files import check_space, file_hash, make_folder, write_file
from finetune.models.locate import locate_model
from finetune.run.folder import RunFolder

STEPS = 12
"""How many greedy tokens are compared."""
TWINNED: tuple[Outtype, ...] = ("f16", "bf16", *QUANTISED)
"""Types so coarse that a fault of the conversion could hide behind them: it is looked for in f32 first.

In f16 a single matrix of SmolLM2 may be off by 1.4 to 2.7% before its logits tell, in f32 by 0.03 to 0.05%.
"""
MOST_CONTEXT = 1024
"""How much of a model's context is tried."""
Teller = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """A file that was written and examined; `sees`: by what share a weight must be off for its logits to tell."""

    path: Path
    outtype: Outtype
    tensors: dict[Storage, int]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    sees: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "file": str(self.path),
            "bytes": self.path.stat().st_size,
            "sha256": file_hash(self.path),
            "outtype": self.outtype,
            "tensors": self.tensors,
            "checks": [asdict(check) for check in self.checks],
            "sees": self.sees,
            "notes": list(self.notes),
        }


def export(
    source: str, *, outtype: Outtype | None, adapter_only: bool, output: Path | None, backend: str, tell: Teller
) -> ExportedFile:
    """Write the GGUF file of a run's result or of a model, and examine it.

    Args:
        source: a finished run's folder, or a model by shipped name, local folder or hub id.
        outtype: f16 for a model and f32 for an adapter where it is None.
        adapter_only: the run's adapter alone, to be put on its base by llama.cpp.
        output: the file to make; by default below the run's folder, or in this one for a model.
        backend: computes the baseline for a model; a run has its own.
        tell: receives progress messages.

    Raises:
        FineTuneError: it was refused, the disk did not take it, or the file does not compute what was trained: such a
            file is kept as NAME.refused.gguf with its report, and there is none of its own name.
    """
    require_gguf()
    run = Path(source) if (Path(source) / "plan.yaml").exists() else None
    outtype = outtype or ("f32" if adapter_only else "f16")
    path = _place(output, run, source, f"adapter-{outtype}" if adapter_only else outtype)
    if run:
        exportable = exportable_run(run, open_backend)
    else:
        require_backend(backend)
        exportable = exportable_model(source, partial(open_backend, backend))
    with RunFolder(run).held() if run and output is None else contextlib.nullcontext():
        return write_exportable(exportable, path, outtype, adapter_only=adapter_only, tell=tell)


def check_export(config: TrainingConfig) -> None:
    """See, before a run begins, that its result can be exported.

    Raises:
        FineTuneError: the model cannot be found, or not be written as GGUF.
    """
    check_exportable(locate_model(config.model.path, revision=config.model.revision))


def write_exportable(
    exportable: Exportable,
    path: Path,
    outtype: Outtype,
    *,
    adapter_only: bool = False,
    tell: Teller = lambda words: None,
) -> ExportedFile:
    """Write one file and examine it, as `export` does.

    Raises:
        FineTuneError: as `export`.
    """
    vocabulary = describe_vocabulary(exportable.tokenizer.description(), exportable.special, exportable.rows)
    keys = file_metadata(exportable, vocabulary)
    described, shape = exportable.described, exportable.shape
    under = twin = None
    if adapter_only:
        blueprint = plan_lora(exportable, outtype)
        under = plan_model(described, shape, exportable.base, keys, outtype)
    else:
        blueprint = plan_model(described, shape, exportable.source, keys, outtype)
        twin = plan_whole(exportable, "f32") if outtype in TWINNED else None
    make_folder(path.parent)
    check_space(
        path,
        blueprint.bytes + sum(other.bytes for other in (under, twin) if other),
        smaller="a smaller --outtype",
    )
    examined: list[Check] = []
    sees: dict[str, float] = {}

    def fill(temporary: Path) -> None:
        weights = sum(tensor.bytes for tensor in blueprint.tensors)
        tell(f"writing {len(blueprint.tensors)} tensors of {weights / 1e6:.1f} MB together")
        write_gguf(blueprint, temporary)
        tell("reading it again, and asking the trainer and llama.cpp the same")
        files = _Files(temporary, outtype, blueprint, under, twin, sees)
        for check in _examine(exportable, vocabulary, files):
            examined.append(check)
            if not check.passed:
                raise _refused(check, outtype, keep_refused(temporary, path, examined))

    write_file(path, fill)
    counts = {kind: sum(tensor.storage == kind for tensor in blueprint.tensors) for kind in BLOCKS}
    told = (*exportable.notes, *(under or blueprint).notes, *vocabulary.notes, *sight_notes(sees))
    kinds = {kind: count for kind, count in counts.items() if count}
    return ExportedFile(path, outtype, kinds, tuple(examined), told, sees)


def plan_whole(exportable: Exportable, outtype: Outtype) -> Blueprint:
    """The file of the whole model, adapter merged in.

    Raises:
        ModelError: something of it has no place in GGUF.
    """
    vocabulary = describe_vocabulary(exportable.tokenizer.description(), exportable.special, exportable.rows)
    keys = file_metadata(exportable, vocabulary)
    return plan_model(exportable.described, exportable.shape, exportable.source, keys, outtype)


def plan_lora(exportable: Exportable, outtype: Outtype) -> Blueprint:
    """The file of the adapter alone.

    Raises:
        ModelError: there is none, or something of it has no place in GGUF.
    """
    if exportable.adapter is None:
        raise ModelError("there is no adapter: the whole model was trained", hint="leave out --adapter-only")
    vocabulary = describe_vocabulary(exportable.tokenizer.description(), exportable.special, exportable.rows)
    keys = file_metadata(exportable, vocabulary)
    naming = {key: value for key, value in keys.items() if key.startswith("general.")}
    return plan_adapter(exportable.described, exportable.shape, exportable.adapter, naming, outtype)


@dataclass(frozen=True, slots=True)
class _Files:
    """What llama.cpp loads: the file; `under`, the base of an adapter; `twin`, a rounded file's copy in f32.

    `sees` gets the share by which each of some weights must be off to be noticed.
    A fault of the conversion shows in the twin, too; what shows in the quantised file alone is due to quantising.
    """

    path: Path
    outtype: Outtype
    planned: Blueprint
    under: Blueprint | None
    twin: Blueprint | None
    sees: dict[str, float]


def _examine(exportable: Exportable, vocabulary: GgufVocabulary, files: _Files) -> Iterator[Check]:
    yield read_back(files.planned, files.path)
    try:
        yield from _ask_both(exportable, vocabulary, files)
    except EvidenceError as error:
        yield Check("llama.cpp", "it does not answer", "answers", error.message)


def _ask_both(exportable: Exportable, vocabulary: GgufVocabulary, files: _Files) -> Iterator[Check]:
    file, texts = exportable.tokenizer.description(), vocabulary.metadata["tokenizer.ggml.tokens"]
    loaded = LoadedTokenizer(file, vocabulary.control, texts)
    trainer = BaselineModel(exportable.tokenizer, loaded, exportable.open(), all_stops(exportable, vocabulary))
    # Of many only the first are tried: those that llama.cpp knows by name among them.
    added = sorted((token["content"] for token in file["added_tokens"]), key=lambda text: text not in CONTROL_BY_NAME)
    corpus = nasty_texts([*added, *sorted(CONTROL_BY_NAME & file["model"]["vocab"].keys())], vocabulary.form)
    context = min(exportable.described.tried_context, MOST_CONTEXT)
    questions, wanted = prepare_questions(
        trainer, corpus, exportable.prompts, steps=min(STEPS, context // 4), context=context
    )
    from_table = exportable.described.family.activation_from_table
    bounds = exportable.bounds(trainer.session, questions.sequences)
    with tempfile.TemporaryDirectory(prefix=f".{files.path.name}.", suffix=".part", dir=files.path.parent) as folder:
        other = Path(folder) / "other.gguf"
        if files.twin:
            write_gguf(files.twin, other)
            bound = bound_of(bounds, files.twin, "f32", from_table=from_table)
            for check in compare(trainer, questions, wanted, ask_llama_cpp(other, questions), bound=bound):
                yield replace(check, stage=f"{check.stage} before quantising")
        if files.under:
            write_gguf(files.under, other)
            answers = ask_llama_cpp(other, questions, adapter=files.path)
        else:
            answers = ask_llama_cpp(files.path, questions)
    bound = bound_of(bounds, files.under or files.planned, files.outtype, from_table=from_table)
    yield from compare(trainer, questions, wanted, answers, bound=bound)
    files.sees.update(bounds.sight(bound))


def _refused(check: Check, outtype: Outtype, kept: Path) -> ExportError:
    # The f32 twin has passed before: what fails now is due to quantising.
    told = outtype in QUANTISED and check.stage in ("logits", "greedy text")
    hint = (
        f"this model bears {outtype} badly: use a larger --outtype"
        if told
        else "this is a fault of FineTune or of llama.cpp: please report it with the model's config.json"
    )
    return ExportError(
        f"the file was written, but at the stage {check.stage!r} it is not what was trained: {check.first} "
        f"({check.measured}; allowed: {check.allowed}); it is kept as {kept.name}, with its report beside it",
        hint=hint,
    )


def _place(output: Path | None, run: Path | None, source: str, kind: str) -> Path:
    name = source.rstrip("/").rsplit("/", 1)[-1]
    path = output or (RunFolder(run).gguf / f"{name}-{kind}.gguf" if run else Path(f"{name}-{kind}.gguf"))
    if path.exists():
        raise OutputError(f"{path} exists already", hint="remove it, or name another file with --output")
    if path.suffix != ".gguf":
        raise OutputError(f"output {path} does not end with .gguf", hint="name the file, not its folder")
    return path
