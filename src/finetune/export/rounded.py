"""What rounding a model's weights to a type does to it, as the trainer computes it, and the bounds that follow.

The weights that are rounded are those that the trainer's framework makes of base and adapter, not those that are
exported: no fault of our own merging or converting is in what is measured here, so that none can widen its own bound.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.evidence.drift import Bound
from finetune.evidence.rounding import ROUNDED_FACTOR, Rounding, measure_between, measure_rounding, measure_sight
from finetune.export.model_files import ModelFiles
from finetune.export.outtypes import Storage
from finetune.export.quantise import quantise
from finetune.export.sources import Files
from finetune.models.shape import read_shape, weight_files
from finetune.ports import Session

Array = NDArray[Any]
Storages = Mapping[str, Storage]
"""The types of a base's weights by their names in its files; those that are left out are not rounded."""

WORTHLESS = 1.0
"""Spreads of the logits: where rounding moves them as far as they lie apart, nothing of the model is left."""


class RoundedWeights:
    """Weights as files of these types have them, in float32 again.

    Args:
        transposed: names of layers that the base stores inputs x outputs, as GPT-2 does: blocks lie along inputs.
    """

    def __init__(self, base: Files, storages: Storages, transposed: Sequence[str]) -> None:
        self._base, self._storages, self._transposed = base, storages, transposed

    def changes(self, name: str) -> bool:
        """Whether one is rounded."""
        return self._storage(name) != "f32"

    def _storage(self, name: str) -> Storage:
        """Its type; GPT-2's files may leave out what the whole model is called."""
        if name in self._storages:
            return self._storages[name]
        return next((kind for known, kind in self._storages.items() if name.endswith(f".{known}")), "f32")

    def read(self, name: str) -> Array:
        """One, rounded and in float32 again."""
        weight = self._base.read(name)
        if not self.changes(name):
            return weight
        import gguf

        storage = self._storage(name)
        turned = weight.ndim == 2 and name.split(".")[-2] in self._transposed
        rows = np.ascontiguousarray(weight.T if turned else weight)
        kind = gguf.GGMLQuantizationType[storage.upper()]
        rounded = gguf.dequantize(quantise(rows, storage), kind).reshape(rows.shape)
        return np.ascontiguousarray(rounded.T if turned else rounded)


@dataclass(frozen=True)
class RoundingBounds:
    """The bounds of one model, each measured when it is first asked for.

    Attributes:
        session: the trainer.
        base: the folder of the weights that an adapter is put on, or that were trained themselves.
        adapted: whether there is an adapter on them.
        sequences: what is computed to measure the bounds.
        open_plain: opens a folder's weights, without an adapter.
        transposed: as `RoundedWeights` has it.
    """

    session: Session
    base: Path
    adapted: bool
    sequences: Sequence[Sequence[int]]
    open_plain: Callable[[Path], Session] = field(repr=False)
    transposed: Sequence[str] = ()
    measured: dict[str, Rounding] = field(default_factory=dict)
    seen: dict[Bound, dict[str, float]] = field(default_factory=dict)

    @property
    def floor(self) -> Rounding:
        """How far float32's own rounding moves the trainer."""
        if "" not in self.measured:
            self.measured[""] = measure_rounding(self.session, self.sequences)
        return self.measured[""]

    def of(self, what: str, storages: Storages) -> Bound:
        """How far a computation of weights of these types may be off; without a type, weights are not rounded."""
        if not storages:
            return self.floor.bound()
        if what not in self.measured:
            with self._rounded(storages) as folder:
                self.measured[what] = measure_between(self.session, self.open_plain(folder), self.sequences)
        rounded, floor = (
            self.measured[what].bound(ROUNDED_FACTOR, f"what {what} does to its weights"),
            self.floor.bound(),
        )
        allowed = min(rounded.distance + floor.distance, WORTHLESS)
        return Bound(allowed, rounded.kl + floor.kl, rounded.why, rounded.off)

    def sight(self, bound: Bound) -> dict[str, float]:
        """By what share each matrix of the middle layer must be off, on its own, to exceed the bound.

        Which of a layer's matrices a fault is in matters more than in which layer.
        """
        if bound in self.seen:
            return self.seen[bound]
        shape = read_shape(self.base)
        middle = f".{shape.layers // 2}."
        names = [name for name, sides in shape.weights.items() if middle in name and len(sides) == 2]
        return self.seen.setdefault(bound, measure_sight(self.session, names, self.sequences, bound))

    @contextmanager
    def _rounded(self, storages: Storages) -> Iterator[Path]:
        """A folder of the model with its weights rounded, for as long as the context lasts."""
        with TemporaryDirectory(prefix="finetune-") as place:
            whole, folder = self.base, Path(place) / "rounded"
            if self.adapted:
                whole = Path(place) / "whole"
                whole.mkdir()
                self.session.save_model(whole)
            folder.mkdir()
            shutil.copy(whole / "config.json", folder)
            files = Files(weight_files(whole))
            ModelFiles(files, RoundedWeights(files, storages, self.transposed), "float32").write(folder)
            yield folder


def sight_notes(sees: Mapping[str, float]) -> tuple[str, ...]:
    """What a comparison of logits can see, in words."""
    if not sees:
        return ()
    most, least = max(sees, key=sees.__getitem__), min(sees, key=sees.__getitem__)
    return (
        f"logits tell when a single weight is off by {sees[least]:.2%} ({least}) or more; of those tried, {most} hides "
        f"longest, up to {sees[most]:.2%}",
    )
