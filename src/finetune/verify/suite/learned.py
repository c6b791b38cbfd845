"""What laws of trained things share: settings with which little is enough to move far, runs, and altered copies."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import Field

from finetune.verify.doors.answers import Logits, TrainingResult, Weights
from finetune.verify.doors.door import RefusesError
from finetune.verify.recipes import ModelRecipe
from finetune.verify.suite.cases import PLAIN, TINY, Pair, Rows, one_of
from finetune.verify.suite.trainer import Tensors, Trainer
from finetune.verify.suite.verdicts import check

Array = NDArray[Any]
R = TypeVar("R")
WIDE = ModelRecipe(layers=2, hidden=18, heads=6, kv_heads=3, head_size=4, intermediate=7, seed=5)
"""Two layers; six heads share three of keys and values, and together are wider than the model."""
QUICK: Mapping[str, Any] = {
    **PLAIN,
    "training.learning_rate": 0.05,
    "training.schedule": "constant",
    "training.warmup_fraction": 0.0,
    "training.batch_size": 1,
    "training.epochs": 2.0,
    "training.save_every": 1_000,
    "training.max_grad_norm": 1e6,
}
"""Two steps a row, so fast that whatever is done with what was learned can be seen; some refuse less than a batch."""
PROMPT = [40, 50, 60, 70, 80]
KINDS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "dora": {"adapter.kind": "dora"},
    "rank-stabilised": {"adapter.scaling": "rank_stabilized"},
    "with a head of its own": {"adapter.modules_to_save": ["lm_head"]},
    "of two layers": {"adapter.targets": ["k_proj", "down_proj"]},
}
"""Kinds of adapters, each with what is to be set for it."""


class Learned(Rows):
    """Rows to learn, by a model and a kind of adapter."""

    model: ModelRecipe = TINY
    kind: Annotated[str, Field(pattern=one_of(KINDS))] = "lora"

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the kind, and quick ones."""
        return {**QUICK, **KINDS[self.kind]}


MODELS = st.sampled_from([TINY, WIDE])
ONE_ROW = st.just((Pair(prompt="ab", completion="cde"),))
"""For laws whose cases are to be all that there are: rows that are drawn make them too many."""


def learned(*kinds: str) -> st.SearchStrategy[Learned]:
    """A row, a model, and one of these kinds; any where none is named."""
    return st.builds(Learned, rows=ONE_ROW, model=MODELS, kind=st.sampled_from(kinds or tuple(KINDS)))


def train(
    trainer: Trainer, model: Path, settings: Mapping[str, Any], rows: Sequence[Any], **more: Any
) -> TrainingResult:
    """A run in a folder of its own."""
    folder = trainer.folder() / "run"
    return trainer.ask("train", TrainingResult, model=model, settings=dict(settings), rows=rows, folder=folder, **more)


def adapter_of(course: TrainingResult) -> str:
    """The folder of the adapter that a run ended with."""
    check(course.adapter is not None, expected="an adapter", got="none")
    assert course.adapter is not None
    return course.adapter


def weights_of(trainer: Trainer, model: Path, adapter: str) -> tuple[Weights, Tensors]:
    """What is in an adapter."""
    told = trainer.ask("adapter_weights", Weights, model=model, adapter=adapter)
    return told, trainer.tensors(told.file)


def logits_of(trainer: Trainer, ability: str, model: str | Path, **more: Any) -> Array:
    """The logits of one prompt."""
    given = {"settings": PLAIN, **more}
    answer = trainer.ask(ability, Logits, model=model, prompts=[PROMPT], **given)
    return np.asarray(trainer.tensors(answer.file)["0"], np.float64)


def same_logits(found: Array, wanted: Array, what: str, *, most: float = 2e-3) -> None:
    """Hold logits to those that must come out, but for what float32 rounds."""
    off = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("inf")
    check(off <= most * (1 + np.abs(wanted).max()), expected=f"{what}, {_told(wanted)}", got=f"{_told(found)}")


def _told(logits: Array) -> str:
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


def altered(trainer: Trainer, model: Path, config: Mapping[str, Any]) -> Path:
    """A copy of a model whose config says these things."""
    folder = trainer.folder() / "model"
    shutil.copytree(model, folder)
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**said, **config}), encoding="utf-8")
    return folder


def marks(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
