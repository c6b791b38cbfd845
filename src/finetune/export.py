"""Writes a run's result, or a model, as GGUF; the file comes to its place only when llama.cpp computes the same."""

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.artifacts.run_folder import RunFolder
from finetune.artifacts.write import check_space, file_hash, make_folder, write_file
from finetune.assembly.gguf_source import (
    Exportable,
    all_stops,
    exportable_model,
    exportable_run,
    file_metadata,
    require_gguf,
)
from finetune.backends import open_backend
from finetune.convert.blueprint import OUTTYPES, Blueprint, Outtype, plan_adapter, plan_model
from finetune.convert.compare import BOUNDS, TABLE_BOUND, Trainer, compare, prepare_questions
from finetune.convert.corpus import nasty_texts
from finetune.convert.llama_cpp import ask_llama_cpp
from finetune.convert.read_back import Check, read_back
from finetune.convert.vocabulary import Vocabulary, describe_vocabulary
from finetune.convert.write import write_gguf
from finetune.errors import ExportError, ModelError, OutputError

STEPS = 24
"""How many greedy tokens are compared."""
MOST_CONTEXT = 1024
"""How much of a model's context is tried."""
Teller = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Exported:
    """A file that was written and examined."""

    path: Path
    outtype: Outtype
    tensors: dict[str, int]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "file": str(self.path),
            "bytes": self.path.stat().st_size,
            "sha256": file_hash(self.path),
            "outtype": self.outtype,
            "tensors": self.tensors,
            "checks": [asdict(check) for check in self.checks],
            "notes": list(self.notes),
        }


def export(
    source: str, *, outtype: Outtype | None, adapter_only: bool, output: Path | None, backend: str, tell: Teller
) -> Exported:
    """Write the GGUF file of a run's result or of a model, and examine it.

    Args:
        source: a finished run's folder, or a model by shipped name, local folder or hub id.
        outtype: f16 for a model and f32 for an adapter where it is None.
        adapter_only: the run's adapter alone, to be put on its base by llama.cpp.
        output: the file to make; by default below the run's folder, or in this one for a model.
        backend: computes what a model's file is held to; a run's own does for a run.
        tell: is told what is done.

    Raises:
        FineTuneError: it was refused, the disk did not take it, or the file does not compute what was trained; in
            none of these cases is there a file.
    """
    require_gguf()
    run = Path(source) if (Path(source) / "plan.yaml").exists() else None
    outtype = outtype or ("f32" if adapter_only else "f16")
    path = _place(output, run, source, f"adapter-{outtype}" if adapter_only else outtype)
    exportable = exportable_run(run, open_backend) if run else exportable_model(source, open_backend(backend))
    with RunFolder(run).held() if run and output is None else contextlib.nullcontext():
        return write_exportable(exportable, path, outtype, adapter_only=adapter_only, tell=tell)


def write_exportable(
    exportable: Exportable,
    path: Path,
    outtype: Outtype,
    *,
    adapter_only: bool = False,
    tell: Teller = lambda words: None,
) -> Exported:
    """Write one file and examine it, as `export` does.

    Raises:
        FineTuneError: as `export`.
    """
    vocabulary = describe_vocabulary(exportable.tokenizer.description(), exportable.special, exportable.rows)
    keys = file_metadata(exportable, vocabulary)
    described, shape = exportable.described, exportable.shape
    under = None
    if adapter_only:
        if exportable.adapter is None:
            raise ModelError("there is no adapter to export alone", hint="leave out --adapter-only")
        naming = {key: value for key, value in keys.items() if key.startswith("general.")}
        blueprint = plan_adapter(described, shape, exportable.adapter, naming, outtype)
        under = plan_model(described, shape, exportable.base, keys, outtype)
    else:
        blueprint = plan_model(described, shape, exportable.source, keys, outtype)
    make_folder(path.parent)
    check_space(path, blueprint.bytes + (under.bytes if under else 0), smaller="a smaller --outtype")
    examined: list[Check] = []

    def fill(temporary: Path) -> None:
        weights = sum(tensor.bytes for tensor in blueprint.tensors)
        tell(f"writing {len(blueprint.tensors)} tensors of {weights / 1e6:.1f} MB together")
        write_gguf(blueprint, temporary)
        examined.append(_hold(read_back(blueprint, temporary)))
        tell("asking the trainer and llama.cpp the same")
        examined.extend(map(_hold, _examine(exportable, vocabulary, temporary, under, outtype)))

    write_file(path, fill)
    counts = {kind: sum(tensor.outtype == kind for tensor in blueprint.tensors) for kind in OUTTYPES}
    told = (*exportable.notes, *(under or blueprint).notes, *vocabulary.notes)
    return Exported(path, outtype, {kind: count for kind, count in counts.items() if count}, tuple(examined), told)


def _examine(
    exportable: Exportable, vocabulary: Vocabulary, file: Path, under: Blueprint | None, outtype: Outtype
) -> tuple[Check, ...]:
    trainer = Trainer(exportable.tokenizer, exportable.open(), all_stops(exportable, vocabulary))
    corpus = nasty_texts(
        [token["content"] for token in exportable.tokenizer.description()["added_tokens"]], vocabulary.form
    )
    context = min(exportable.described.tried_context, MOST_CONTEXT)
    questions, wanted = prepare_questions(
        trainer, corpus, exportable.prompts, steps=min(STEPS, context // 4), context=context
    )
    bound = max(BOUNDS[outtype], TABLE_BOUND if exportable.described.family.looks_up else 0.0)
    if under is None:
        return compare(trainer, questions, wanted, ask_llama_cpp(file, questions), bound=bound)
    with tempfile.TemporaryDirectory(prefix=".finetune-", dir=file.parent) as folder:
        base = Path(folder) / "base.gguf"
        write_gguf(under, base)
        answers = ask_llama_cpp(base, questions, adapter=file)
    return compare(trainer, questions, wanted, answers, bound=bound)


def _hold(check: Check) -> Check:
    if not check.holds:
        raise ExportError(
            f"the file was written, but at the stage {check.stage!r} it is not what was trained: {check.first} "
            f"({check.measured}; allowed: {check.allowed}); nothing is left of it",
            hint="this is a fault of FineTune or of llama.cpp: please report it with the model's config.json",
        )
    return check


def _place(output: Path | None, run: Path | None, source: str, kind: str) -> Path:
    name = source.rstrip("/").rsplit("/", 1)[-1]
    path = output or (RunFolder(run).gguf / f"{name}-{kind}.gguf" if run else Path(f"{name}-{kind}.gguf"))
    if path.exists():
        raise OutputError(f"{path} exists already", hint="remove it, or name another file with --output")
    if path.suffix != ".gguf":
        raise OutputError(f"output {path} does not end with .gguf", hint="name the file, not its folder")
    return path
