"""A finished run's result: where it lies, on which base, and prompts to try it with; loads no weight."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.adapters.peft_files import WEIGHTS, read_settings
from finetune.chat.encoder import Encoder
from finetune.chat.tokenizer import FileTokenizer
from finetune.config import TrainingConfig, load_plan
from finetune.errors import ModelError
from finetune.evidence.saved import check_saved, open_encoder, open_tuned, prepare_again
from finetune.export.families import FAMILIES
from finetune.export.rounded import RoundingBounds
from finetune.export.sources import AdapterWeights, Files, Merged
from finetune.models.locate import locate_model
from finetune.models.shape import read_shape, weight_files
from finetune.ports import Backend, Session
from finetune.records import Conversation, Message, ModelLocation, ModelShape
from finetune.run.folder import RunFolder
from finetune.training.prepare import Prepared

MOST_QUESTIONS = 8
"""How many of a run's questions are asked again: what is wrong with a weight shows in each of them."""
_PROMPTS = ("Hello", "The capital of France is", "1 2 3 4 5 6 7", "def main():\n    ", "a b c d e f g " * 36)
Prompts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished run has trained, byte for byte; `saved` is the folder of its adapter, or of its whole model."""

    run: RunFolder
    config: TrainingConfig
    manifest: Mapping[str, Any]
    location: ModelLocation
    saved: Path
    encoder: Encoder
    open_backend: Callable[[str], Backend]

    @property
    def whole(self) -> bool:
        """Whether the whole model was trained, so that there is no adapter."""
        return self.saved == self.run.model

    @property
    def folder(self) -> Path:
        """Where the weights lie that an adapter is put on, or that were trained themselves."""
        return self.saved if self.whole else self.location.folder

    def adapter(self) -> AdapterWeights | None:
        """The adapter; None where the whole model was trained."""
        transposed = read_shape(self.folder).transposed
        return (
            None
            if self.whole
            else AdapterWeights(self.saved / WEIGHTS, read_settings(self.saved, transposed=transposed))
        )

    def weights(self) -> tuple[Files, Files | Merged]:
        """The weights as they are in files, and with what was trained in them.

        Raises:
            ModelError: they are quantised, or the adapter does not fit them.
        """
        files, adapter = Files(weight_files(self.folder)), self.adapter()
        refuse_packed(read_shape(self.folder), self.location)
        return files, Merged(files, adapter, self.transposed) if adapter else files

    @property
    def transposed(self) -> tuple[str, ...]:
        """Names of layers whose weights the base stores inputs x outputs."""
        return FAMILIES["gpt2"].transposed if read_shape(self.folder).transposed else ()

    def bounds(self, session: Session, sequences: Sequence[Sequence[int]]) -> RoundingBounds:
        """How far other computations of the result may be from this session, measured on these sequences."""
        return RoundingBounds(session, self.folder, not self.whole, sequences, self.open_plain, self.transposed)

    def open_plain(self, folder: Path) -> Session:
        """The weights in a folder, in float32, by the run's own backend."""
        backend, place = self.open_backend(self.config.backend), ModelLocation(self.location.name, folder, "local")
        return backend.open(place, "float32", self.encoder.tokenizer.pad_id, device=self.config.model.device)

    def open(self, backend: str | None = None) -> Session:
        """What was trained, in float32 on the full base, by the run's own backend or another.

        Raises:
            FineTuneError: that backend cannot be opened here, or does not compute this model.
        """
        device = self.config.model.device if backend in (None, self.config.backend) else "auto"

        def opener(place: ModelLocation) -> Session:
            opened = self.open_backend(backend or self.config.backend)
            return opened.open(place, "float32", self.encoder.tokenizer.pad_id, device=device)

        return open_tuned(self.run, self.config, self.location, opener)

    def prompts(self) -> Prompts:
        """Prompts to try what was trained with: questions that the run asked, and plain text."""
        asked = ((self.manifest.get("scores") or {}).get("learning") or {}).get("tuned") or {"answers": []}
        questions = [answer["question"] for answer in asked["answers"][:MOST_QUESTIONS]]
        ids = (self.encoder.prompt_ids(Conversation((Message("user", text),), "export")) for text in questions)
        return (*ids, *plain_prompts(self.encoder.tokenizer))

    def prepare(self) -> Prepared:
        """The run's data prepared again.

        Raises:
            FineTuneError: the data has changed since, or cannot be used any more.
        """
        return prepare_again(self.run)

    @property
    def quantized_notes(self) -> tuple[str, ...]:
        """What is to be told where the adapter learned on a base that was quantised as it was loaded."""
        if self.config.model.quantize is None:
            return ()
        return (
            f"the adapter learned on a base that was quantised to {self.config.model.quantize} as it was loaded; what "
            "is written holds the full base with that adapter, and is held to what the full base computes with it",
        )


def refuse_packed(shape: ModelShape, location: ModelLocation) -> None:
    """Refuse a base whose weights are quantised in its files.

    Raises:
        ModelError: they are.
    """
    if shape.quantized:
        raise ModelError(
            f"the base {location.name!r} is quantised in its files: an adapter cannot be merged into those",
            hint="use weights that are not quantised",
        )


def open_result(path: Path, open_backend: Callable[[str], Backend]) -> Result:
    """What the finished run in a folder has trained.

    Raises:
        FineTuneError: the run is not finished, or a file of it or of its base has changed.
    """
    run = RunFolder.finished(path)
    config, manifest = load_plan(run.plan).config, run.read_manifest()
    location = locate_model(config.model.path, revision=config.model.revision)
    saved = check_saved(run, config, location)
    return Result(run, config, manifest, location, saved, open_encoder(run, config, location), open_backend)


def plain_prompts(tokenizer: FileTokenizer) -> Prompts:
    """Plain text, short and long, as ids."""
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return tuple((*bos, *tokenizer.encode_content(text)) for text in _PROMPTS)
