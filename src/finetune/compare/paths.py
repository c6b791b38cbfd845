"""Inference paths of a run's result: PEFT, other backends, the merged model folder, GGUF files of each type."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from finetune.compare.server_path import ask_server
from finetune.errors import ExportError, ModelError
from finetune.evidence.answering import ask_folder, ask_peft, ask_session
from finetune.evidence.drift import Bound, Ids, InferenceRequest, InferenceResponse
from finetune.export.blueprint import plan_model
from finetune.export.gguf import plan_lora
from finetune.export.gguf_check import bound_of
from finetune.export.gguf_source import Exportable, all_stops, exportable_result, file_metadata, require_gguf
from finetune.export.llama_cpp import Questions, ask_llama_cpp
from finetune.export.merged_folder import merged_problems, plan_weights, write_merged, written_weights
from finetune.export.outtypes import Outtype
from finetune.export.read_back import read_back
from finetune.export.result import Result
from finetune.export.rounded import RoundingBounds
from finetune.export.vocabulary import GgufVocabulary, describe_vocabulary
from finetune.export.write import write_gguf
from finetune.files import check_space, storage_errors
from finetune.records import Conversation

Asker = Callable[[InferenceRequest], InferenceResponse]


@dataclass(frozen=True, slots=True)
class CallablePath:
    """A path that calls a function; `what` names the file or program that computes it."""

    name: str
    bound: Bound | None
    what: str
    ask: Asker = field(repr=False)


def backend_path(result: Result, backend: str) -> CallablePath:
    """Base and adapter in float32 on another of our backends."""

    def ask(request: InferenceRequest) -> InferenceResponse:
        return ask_session(result.open(backend), request)

    return CallablePath(backend, None, f"the {backend} backend, adapter on its base, float32", ask)


def peft_path(result: Result) -> CallablePath:
    """The adapter's folder on its base, as PEFT alone loads it.

    Raises:
        ModelError: the whole model was trained.
    """
    if result.whole:
        raise ModelError("there is no adapter: the whole model was trained")
    ask = partial(ask_peft, result.folder.resolve(), result.saved.resolve())
    return CallablePath("peft", None, "PEFT alone on the adapter's folder, float32", ask)


def merged_path(result: Result, bounds: RoundingBounds) -> CallablePath:
    """The model folder that `ft merge` wrote, or a temporary one, as plain transformers computes it.

    Raises:
        FineTuneError: as `folder_path`.
    """
    return folder_path("merged", result, bounds, partial(ask_folder, otherwise=result.config.backend))


def folder_path(
    name: str, result: Result, bounds: RoundingBounds, ask_of: Callable[[Path, InferenceRequest], InferenceResponse]
) -> CallablePath:
    """The model folder that `ft merge` wrote, or a temporary one.

    Raises:
        FineTuneError: the folder has changed since it was written, or none can be made.
    """
    kept = result.run.merged
    if not kept.exists():
        weights = plan_weights(result, None)
        bound = bounds.of(weights.rounding, weights.storages)

        def made(request: InferenceRequest) -> InferenceResponse:
            with _temporary_folder(result, weights.total_bytes) as folder:
                write_merged(result, weights, folder)
                return ask_of(folder.resolve(), request)

        return CallablePath(name, bound, "a model folder made for this", made)
    try:
        weights = written_weights(result, kept)
        wrong = next(merged_problems(result, weights, kept), "")
    except ModelError as error:
        wrong = error.message
    _refuse_damaged(kept, wrong)
    bound = bounds.of(weights.rounding, weights.storages)
    return CallablePath(name, bound, "the model folder merged", partial(ask_of, kept.resolve()))


@dataclass(frozen=True, slots=True)
class GgufPaths:
    """llama.cpp on a run's result."""

    result: Result
    exportable: Exportable
    vocabulary: GgufVocabulary

    @property
    def stops(self) -> Ids:
        """The ids at which llama.cpp ends an answer, the run's own among them."""
        return all_stops(self.exportable, self.vocabulary)

    def of(self, outtype: Outtype, bounds: RoundingBounds) -> tuple[CallablePath, ...]:
        """llama.cpp on each file of this type that `ft export` wrote, or on a temporary one.

        Raises:
            FineTuneError: the model cannot be written so.
        """
        return self._asked(f"gguf-{outtype}", outtype, partial(_ask_file, self.exportable), bounds)

    def adapted(self, bounds: RoundingBounds) -> CallablePath:
        """llama.cpp with the adapter's own file (`--lora`) on its base's, both in float32, made for this.

        Raises:
            FineTuneError: there is no adapter, or it or its base cannot be written so.
        """
        made_of = self.exportable
        over = plan_lora(made_of, "f32")
        keys = file_metadata(made_of, self.vocabulary)
        under = plan_model(made_of.described, made_of.shape, made_of.base, keys, "f32")
        bound = bound_of(bounds, under, "f32", from_table=made_of.described.family.activation_from_table)

        def ask(request: InferenceRequest) -> InferenceResponse:
            with _temporary_folder(self.result, under.bytes + over.bytes) as place:
                write_gguf(under, place / "model.gguf")
                write_gguf(over, place / "adapter.gguf")
                return _ask_file(made_of, place / "model.gguf", request, adapter=place / "adapter.gguf")

        return CallablePath("gguf-lora", bound, "llama.cpp with the adapter's file on its base's", ask)

    def served(self, known: Mapping[Ids, Conversation], bounds: RoundingBounds) -> tuple[CallablePath, ...]:
        """The chat API of llama.cpp's server on an f16 file.

        Args:
            known: conversations by the ids of their prompts.

        Raises:
            FineTuneError: the model cannot be written so.
        """
        ask = partial(ask_server, encoder=self.result.encoder, known=known)
        return self._asked("server", "f16", ask, bounds)[:1]

    def _asked(
        self,
        name: str,
        outtype: Outtype,
        ask: Callable[[Path, InferenceRequest], InferenceResponse],
        bounds: RoundingBounds,
    ) -> tuple[CallablePath, ...]:
        """One path for each file.

        Raises:
            FineTuneError: the model cannot be written so.
        """
        made_of = self.exportable
        keys = file_metadata(made_of, self.vocabulary)
        blueprint = plan_model(made_of.described, made_of.shape, made_of.source, keys, outtype)
        bound = bound_of(bounds, blueprint, outtype, from_table=made_of.described.family.activation_from_table)
        found = sorted(self.result.run.gguf.glob(f"*-{outtype}.gguf"))
        kept = [file for file in found if not file.name.endswith(f"adapter-{outtype}.gguf")]

        def written(file: Path, request: InferenceRequest) -> InferenceResponse:
            _refuse_damaged(file, read_back(blueprint, file).first)
            return ask(file, request)

        def made(request: InferenceRequest) -> InferenceResponse:
            with _temporary_folder(self.result, blueprint.bytes) as place:
                write_gguf(blueprint, place / "model.gguf")
                return ask(place / "model.gguf", request)

        paths = (CallablePath(name, bound, f"llama.cpp on gguf/{file.name}", partial(written, file)) for file in kept)
        return tuple(paths) or (CallablePath(name, bound, "llama.cpp on a file made for this", made),)


def open_gguf_paths(result: Result) -> GgufPaths:
    """Prepare a run's result for llama.cpp.

    Raises:
        MissingExtraError: it is not installed.
        FineTuneError: this model cannot be written as GGUF.
    """
    require_gguf()
    made_of = exportable_result(result)
    vocabulary = describe_vocabulary(made_of.tokenizer.description(), made_of.special, made_of.rows)
    return GgufPaths(result, made_of, vocabulary)


def _ask_file(
    exportable: Exportable, file: Path, request: InferenceRequest, *, adapter: Path | None = None
) -> InferenceResponse:
    longest = max(len(prompt) + steps for prompt, steps in zip(request.prompts, request.steps, strict=True))
    if longest > exportable.described.tried_context:
        raise ModelError(
            f"beyond {exportable.described.tried_context} tokens llama.cpp reads otherwise than the trainer, and a "
            f"question with its answer has {longest}"
        )
    sequences = [request.sequence(place) for place in request.places]
    plain_id = exportable.tokenizer.encode_content("a")[-1]
    questions = Questions([], request.prompts, sequences, max(request.steps), longest + 1, plain_id)
    told = ask_llama_cpp(file, questions, adapter=adapter)
    return InferenceResponse(request.cut([continuation.ids for continuation in told.continuations]), told.following)


def _refuse_damaged(path: Path, wrong: str) -> None:
    if wrong:
        raise ExportError(f"{path} is not what was written: {wrong}", hint="remove it, and write it again from the run")


@contextmanager
def _temporary_folder(result: Result, wanted: int) -> Iterator[Path]:
    """A temporary folder below the run's, on a disk with so many bytes free."""
    path = result.run.path
    check_space(path / "equivalence", wanted, smaller="name fewer paths with --through")
    with (
        storage_errors(path / "equivalence"),
        tempfile.TemporaryDirectory(prefix=".equivalence.", suffix=".part", dir=path) as folder,
    ):
        yield Path(folder)
