"""What a run will be, before a weight is loaded: steps, tokens and, as an estimate, minutes.

Arithmetic is counted: 2 FLOP for each weight and token forward, as many again to hand gradients back, and once more
where the weight itself is trained. How fast this machine multiplies is measured, on matrices as wide as the model,
without a framework. What a step does beside its products is a share and a price per layer, both measured once.
"""

import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.abilities import ABILITIES, ONE_THREAD
from finetune.chat.fit import DataCounts
from finetune.config import Origin, flatten
from finetune.data.batches import epoch_batches
from finetune.data.overlap import Overlap
from finetune.data.stored import Outlines
from finetune.errors import counted
from finetune.evidence.budget import FREE
from finetune.records import Batch
from finetune.training.prepare import Prepared, batch_of_all, held_out_batches, pack_length

_MEASURED_SECONDS = 0.25
_WIDEST = 2048
_SHARE = {"torch": 0.6, "mlx": 0.25, "reference": 0.08}
"""The speed of a step's matrix products, as a share of one product's that is repeated."""
_LAYER_SECONDS = {"torch": 0.008, "mlx": 0.02, "reference": 0.002}
"""What a batch takes for each layer beside its products, however few tokens it has."""
TOOK = (0.9, 6.0)
"""How many times the estimate runs took, least and most, where it was measured: on two cores that had four to five
times the work they could do. 19 runs of the shipped models with torch took 0.9 to 2.3 times as long as was said, 3 of
SmolLM2-135M (a step or two) 2.3 to 4.9 times, 2 with the reference backend 1.0 to 1.3 and 2 with MLX 5.6 to 5.9 times.
On an idle machine it was not measured."""


@dataclass(frozen=True, slots=True)
class RunForecast:
    """What a run will be. All is counted but the seconds, an estimate; they are None where none can be made, and `why`.

    `seconds` are those of training, `judging_seconds` what judging may add by `judge.budget`.

    `tokens` and `trained_tokens` are those of all steps together; `gflops` is the measured speed of this machine;
    `settings` are the learning rate and the epochs, each with its origin; `rows` says what became of the rows, and
    `beside` of those of other files, by their setting's name; `overlaps` which of these training repeats.
    """

    rows: DataCounts
    settings: Mapping[str, tuple[float, Origin]]
    steps: int
    tokens: int
    trained_tokens: int
    seconds: float | None
    judging_seconds: float | None
    gflops: float | None
    why: str
    beside: Mapping[str, DataCounts]
    overlaps: Mapping[str, Overlap]
    notes: tuple[str, ...]

    @property
    def warnings(self) -> list[str]:
        """What nobody may miss: rows that are dropped beyond a few."""
        files = {"train": self.rows, **self.beside}
        return [f"data.{name}: {said}" for name, counts in files.items() if (said := counts.many_dropped)]

    def values(self) -> dict[str, Any]:
        """As JSON values; what could not be estimated is null."""
        return {
            "rows": asdict(self.rows),
            **{name: asdict(counts) for name, counts in self.beside.items()},
            "overlap": {name: found.values() for name, found in self.overlaps.items() if found.rows},
            "warnings": self.warnings,
            "notes": list(self.notes),
            "steps": self.steps,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "minutes": None if self.seconds is None else self.seconds / 60,
            "judging_minutes": None if self.judging_seconds is None else self.judging_seconds / 60,
            "training_took_times": list(TOOK),
            "gflops": self.gflops,
            "not_estimated": self.why or None,
            "settings": {key: {"value": value, "origin": origin} for key, (value, origin) in self.settings.items()},
        }

    def sentences(self) -> list[str]:
        """For people: how it is trained, and what that comes to."""
        named = [f"{key} {value:g} ({origin})" for key, (value, origin) in self.settings.items()]
        return [*self._of_rows(), ", ".join(named), *self._comes_to()]

    def _of_rows(self) -> list[str]:
        """What is not learned of the rows that are trained on; nothing where all of all is."""
        said = []
        if count := self.rows.reaching:
            reach, learned = counted(count, "token", "reaches/reach"), "is" if count == 1 else "are"
            said.append(f"{reach} from a prompt into an earlier answer, and {learned} not learned")
        if count := self.rows.unlearned:
            said.append(f"{counted(count, 'answer', 'is/are')} not learned, as rows say (weight, train)")
        said += [
            f"{counted(count, 'row', 'holds/hold')} turns of the template {name} already: control tokens in them are "
            "meant, and no template is put around them again"
            for name, count in sorted(self.rows.templated.items())
        ]
        if count := self.rows.lookalikes:
            said.append(
                f"{counted(count, 'row', 'has/have')} the template's own tokens in what somebody says, as plain "
                "text, with the template around it; where they are meant, give the row as text or as prompt and "
                "completion"
            )
        return said

    def sentence(self) -> str:
        """What it comes to, in one line."""
        counts, *minutes = self._comes_to()
        return f"{counts}; {' '.join(minutes)}"

    def _comes_to(self) -> list[str]:
        said = f"{self.steps:,} steps, {self.tokens:,} tokens, {self.trained_tokens:,} of them trained"
        if self.seconds is None or self.judging_seconds is None:
            return [said, f"minutes are not estimated: {self.why}"]
        training, judging = (
            f"{minutes:,.0f}" if minutes >= 10 else f"{max(0.1, minutes):.1f}"
            for minutes in (self.seconds / 60, self.judging_seconds / 60)
        )
        return [
            said,
            f"about {training} minutes of training here and up to {judging} of judging",
            f"(an estimate: on a busy machine training took {TOOK[0]:g} to {TOOK[1]:g} times that)",
        ]


def forecast_run(prepared: Prepared) -> RunForecast:
    """Count a run's steps and tokens, and estimate how long this machine's processor takes to train."""
    training, size = prepared.plan.config.training, batch_of_all(prepared.plan)

    rows = Outlines(prepared.training_rows)

    def batches_of(epoch: int) -> Sequence[Batch]:
        seed, length = training.seed, pack_length(prepared.plan)
        return epoch_batches(rows, size, seed=seed, epoch=epoch, pack_length=length)

    first, accumulated = batches_of(0), training.gradient_accumulation_steps
    epochs, rest = divmod(prepared.total_steps, ceil(len(first) / accumulated))
    last = batches_of(epochs)[: rest * accumulated] if rest else []
    work = epochs * _count(first) + _count(last)
    why = _gpu(prepared)
    seconds = judging = gflops = None
    if not why:
        gflops = _gflops(*_sizes(prepared, work))
        seconds = _seconds(prepared, work, gflops)
        speed = _SHARE[prepared.plan.config.backend] * gflops * 1e9
        judging = max(prepared.plan.config.judge.budget * seconds, FREE / speed)
    origins = prepared.plan.origins
    settings = {
        key: (value, origins[key])
        for key, value in flatten(prepared.plan.config).items()
        if key in ("training.learning_rate", "training.epochs")
    }
    counted = prepared.total_steps, int(work[0]), int(work[1])
    beside = {"valid": prepared.held_out, "rehearsal": prepared.rehearsal}
    others = {name: encoded.counts for name, encoded in beside.items() if encoded}
    told = others, prepared.overlaps, prepared.notes
    return RunForecast(prepared.train.counts, settings, *counted, seconds, judging, gflops, why, *told)


def _count(batches: Iterable[Batch]) -> NDArray[np.int64]:
    """Tokens, targets, tokens with padding, how many tokens these look at, and batches."""
    found = np.zeros(5, np.int64)
    for batch in batches:
        longest = max(sum(len(row.ids) for row in sequence) for sequence in batch.sequences)
        padded = longest * len(batch.sequences)
        found += (batch.token_count, batch.target_count, padded, padded * longest, 1)
    return found


def _seconds(prepared: Prepared, work: NDArray[np.int64], gflops: float) -> float:
    """What the steps and the looks at the held-out loss between them take."""
    shape, config = prepared.shape, prepared.plan.config
    weights = sum(prod(layer.shape) for layer in shape.linear_layers) or shape.parameters

    def forward(counted: NDArray[np.int64]) -> float:
        _, targets, padded, looked_at, _ = map(float, counted)
        attention = 4 * shape.layers * shape.heads * shape.head_dim * looked_at
        return 2 * weights * padded + attention + 2 * shape.vocab_size * shape.hidden_size * targets

    held_out = _count(held_out_batches(prepared))
    looks = 1 + ceil(prepared.total_steps / (config.training.evaluate_every or 1))
    flop = forward(work) * (3 if prepared.target is None else 2) + looks * forward(held_out)
    if prepared.target is not None:
        flop += 6.0 * prepared.trainable_parameters * float(work[2])
    batches = 3 * int(work[4]) + looks * int(held_out[4])
    price = _LAYER_SECONDS[config.backend] * shape.layers * batches / 3
    return flop / (_SHARE[config.backend] * gflops * 1e9) + price


def _sizes(prepared: Prepared, work: NDArray[np.int64]) -> tuple[int, int, int]:
    """Rows, inner and columns of a product such as the run is made of, none above what is quick to measure."""
    shape = prepared.shape
    if shape.parameters < ONE_THREAD:
        return 64, 64, 64  # so few that NumPy, too, takes one thread
    rows = 1 << (int(work[2]) // max(1, int(work[4]))).bit_length()
    wide = shape.intermediate_size or 4 * shape.hidden_size
    return min(rows, _WIDEST), min(shape.hidden_size, _WIDEST), min(wide, _WIDEST)


@cache
def _gflops(rows: int, inner: int, columns: int) -> float:
    """How fast NumPy multiplies float32 matrices of these sizes here, measured for a quarter of a second."""
    one, other = np.ones((rows, inner), np.float32), np.ones((inner, columns), np.float32)
    one @ other
    started, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < _MEASURED_SECONDS or not done:
        one @ other
        done += 1
    return 2.0 * rows * inner * columns * done / passed / 1e9


def _gpu(prepared: Prepared) -> str:
    """Why the processor's speed says nothing: the run computes on a GPU, or may; empty where it does not."""
    config = prepared.plan.config
    there = Path("/dev/nvidia0").exists() or (sys.platform == "darwin" and platform.machine() == "arm64")
    auto = config.model.device == "auto" and "gpu" in ABILITIES[config.backend].devices
    if config.model.device == "gpu" or (auto and there):
        return "it computes on a GPU, whose speed is known to its framework alone"
    return ""
