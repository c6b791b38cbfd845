"""What checks of laws share: rows as tokens, runs, adapters, logits, altered copies of models."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from finetune.verify.check import check
from finetune.verify.client import SubjectClient, Tensors
from finetune.verify.subjects.answers import Logits, Loss, TokenRow, TokenRows, TrainingResult, Weights
from finetune.verify.subjects.subject import RefusesError
from finetune_strategies.cases.learned import PROMPT
from finetune_strategies.cases.rows import PLAIN, TINY, IdRow

Array = NDArray[Any]
R = TypeVar("R")
_NEAR = 2e-3
"""How far a loss may be off, relatively: float32 sums of a few dozen terms are within a tenth of it."""


def check_loss(loss: float, expected: float) -> None:
    """The loss is this one, rounding aside."""
    near = abs(loss - expected) <= _NEAR * max(1.0, abs(expected))
    check(near, expected=f"loss {expected:.5f}", got=f"loss {loss:.5f}")


def loss_of(trainer: SubjectClient, rows: tuple[IdRow, ...]) -> tuple[float, int]:
    """The loss of a batch, and over how many tokens it is."""
    batch = [row.value for row in rows]
    found = trainer.ask("loss", Loss, model=trainer.model(TINY), settings=PLAIN, batch=batch)
    learned = sum(row.answer for row in rows)
    check(found.count in (None, learned), expected=f"{learned} tokens are learned", got=found.count)
    return found.loss, learned


def tokenized(
    trainer: SubjectClient, model: Path, rows: Sequence[Mapping[str, object]], settings: Mapping[str, object]
) -> TokenRows:
    """Rows as they are trained on, with these settings on top of plain ones; each token of theirs has a mark."""
    found = trainer.ask("tokenize", TokenRows, model=model, settings={**PLAIN, **settings}, rows=list(rows))
    for row in found.rows:
        size, marks = len(row.ids), len(row.targets)
        check(size == marks, expected=f"{size} tokens with {size} marks", got=f"{size} tokens with {marks} marks")
    return found


def tokenized_row(
    trainer: SubjectClient, model: Path, row: Mapping[str, object], settings: Mapping[str, object]
) -> TokenRow:
    """A row as it is trained on, which is one row."""
    rows = tokenized(trainer, model, [row], settings).rows
    check(len(rows) == 1, expected="1 row", got=f"{len(rows)} rows")
    return rows[0]


def text_of(words: Mapping[int, bytes], row: TokenRow, *, trained: bool = False) -> bytes:
    """The bytes of a row's tokens, control tokens by name; with `trained` only of those that are learned."""
    said = zip(row.ids, row.targets, strict=True)
    return b"".join(words.get(token, b"?") for token, target in said if target or not trained)


def comparable(rows: TokenRows) -> list[tuple[int, list[int], list[bool]]]:
    """The rows as values that can be compared."""
    return [(row.row, row.ids, row.targets) for row in rows.rows]


def train(
    trainer: SubjectClient, model: Path, settings: Mapping[str, object], rows: Sequence[object], **more: object
) -> TrainingResult:
    """A run in a folder of its own."""
    folder = trainer.folder() / "run"
    return trainer.ask("train", TrainingResult, model=model, settings=dict(settings), rows=rows, folder=folder, **more)


def adapter_of(course: TrainingResult) -> str:
    """The folder of the adapter that a run ended with."""
    check(course.adapter is not None, expected="an adapter", got="none")
    assert course.adapter is not None
    return course.adapter


def weights_of(trainer: SubjectClient, model: Path, adapter: str) -> tuple[Weights, Tensors]:
    """What is in an adapter."""
    weights = trainer.ask("adapter_weights", Weights, model=model, adapter=adapter)
    return weights, trainer.tensors(weights.file)


def same_course(
    trainer: SubjectClient, model: Path, start: str, course: TrainingResult, wanted: TrainingResult
) -> None:
    """Hold a run to the oracle's from the same adapter: as many steps, their losses, and where each tensor ends."""
    count = len(wanted.steps)
    check(len(course.steps) == count, expected=f"{count} steps", got=f"{len(course.steps)} steps")
    for step, right in zip(course.steps, wanted.steps, strict=True):
        near = step.loss is None or abs(step.loss - (right.loss or 0.0)) <= 5e-3 * (1 + (right.loss or 0.0))
        check(near, expected=f"loss {right.loss} at step {step.step}", got=step.loss)
    _, found = weights_of(trainer, model, adapter_of(course))
    _, ends = weights_of(trainer.oracle, model, adapter_of(wanted))
    begins = trainer.tensors(start)
    for name, end in ends.items():
        check(name in found, expected=name, got=sorted(found))
        distance = float(np.abs(end - begins[name]).mean())
        off = float(np.abs(found[name] - end).mean())
        check(
            off <= distance / 50 + 1e-8, expected=f"{name} moved by {distance:.4g}", got=f"it ends {off:.4g} from there"
        )


def logits_of(trainer: SubjectClient, ability: str, model: str | Path, **more: object) -> Array:
    """The logits of one prompt."""
    given = {"settings": PLAIN, **more}
    answer = trainer.ask(ability, Logits, model=model, prompts=[PROMPT], **given)
    return np.asarray(trainer.tensors(answer.file)["0"], np.float64)


def same_logits(found: Array, wanted: Array, what: str, *, most: float = 2e-3) -> None:
    """Hold logits to those that must come out, but for what float32 rounds."""
    off = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")
    check(off <= most * (1 + np.abs(wanted).max()), expected=f"{what}, {_shown(wanted)}", got=f"{_shown(found)}")


def _shown(logits: Array) -> str:
    return " ".join(f"{value:.4g}" for value in logits[-1, :6]) + " ..."


def refused(ask: Callable[[], R]) -> R | None:
    """The answer to a question that has to be refused; None where it was."""
    try:
        return ask()
    except RefusesError:
        return None


def accepted(ask: Callable[[], R], what: str) -> R:
    """The answer to a question that must not be refused."""
    try:
        return ask()
    except RefusesError as error:
        check(False, expected=f"{what} is taken", got=f"it is refused: {error}")  # noqa: FBT003  # it never holds
        raise AssertionError from None


def altered(trainer: SubjectClient, model: Path, config: Mapping[str, object]) -> Path:
    """A copy of a model whose config says these things."""
    folder = trainer.folder() / "model"
    shutil.copytree(model, folder)
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**said, **config}), encoding="utf-8")
    return folder


def marks(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def spoilt_adapter(adapter: str, how: str, which: int, into: Path) -> Path:
    """A copy of an adapter with one tensor spoilt."""
    shutil.copytree(adapter, into)
    file = next(into.glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[which % len(tensors)]
    if how == "moved":
        layer = name.partition(".lora_")[0]
        for each in [each for each in tensors if each.startswith(f"{layer}.")]:
            tensors[each.replace("layers.0", "layers.7")] = tensors.pop(each)
    elif how == "added":
        tensors[name.replace("layers.0", "layers.7")] = tensors[name]
    else:
        tensor = tensors.pop(name)
        if how == "renamed":
            tensors[f"wrong.{name}"] = tensor
        elif how == "reshaped":
            tensors[name] = np.ascontiguousarray(np.vstack([tensor, tensor]))
    save_file(tensors, file)
    return into
