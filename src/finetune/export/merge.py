"""Merges a run's adapter into its base; the model folder comes to its place only once it computes the same."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.backends import open_backend
from finetune.errors import ExportError, OutputError
from finetune.evidence.answering import ask_folder
from finetune.evidence.baseline import compute_baseline
from finetune.evidence.drift import problems
from finetune.export.merged_folder import plan_weights, write_merged
from finetune.export.model_files import Dtype, ModelFiles
from finetune.export.read_back import Check, keep_refused
from finetune.export.result import Result, open_result
from finetune.export.rounded import sight_notes
from finetune.export.sources import Files
from finetune.files import check_space, describe_files, make_folder, write_folder
from finetune.models.shape import read_shape, weight_files

STEPS = 12
"""How many greedy tokens are compared."""
_SIDE_BYTES = 64 << 20
"""Room for what lies beside the weights."""
Teller = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class MergedModel:
    """A model folder that was written and examined; `sees`: by what share a weight must be off for logits to tell."""

    path: Path
    dtype: Dtype | None
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    sees: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "folder": str(self.path),
            "dtype": self.dtype or "as the base",
            "files": describe_files(self.path),
            "checks": [asdict(check) for check in self.checks],
            "sees": self.sees,
            "notes": list(self.notes),
        }


def merge(run: Path, *, output: Path | None, dtype: Dtype | None, tell: Teller = lambda words: None) -> MergedModel:
    """Write a run's result as an ordinary Hugging Face model folder, and examine it.

    Args:
        output: the folder to make; by default `merged` below the run's.
        dtype: how weights are stored; None keeps each as the base has it.
        tell: receives progress messages.

    Raises:
        FineTuneError: it was refused, the disk did not take it, or the folder does not compute what was trained: such
            a folder is kept as NAME.refused with its report, and there is none of its own name.
    """
    result = open_result(run, open_backend)
    path = output or result.run.merged
    if os.path.lexists(path):
        raise OutputError(f"{path} exists already", hint="remove it, or name another folder with --output")
    weights = plan_weights(result, dtype)
    make_folder(path.parent)
    check_space(path, weights.total_bytes + _SIDE_BYTES, smaller="--dtype bfloat16")
    examined: list[Check] = []
    sees: dict[str, float] = {}

    def fill(folder: Path) -> None:
        tell(f"writing {len(weights.base.names())} weights of {weights.total_bytes / 1e6:.1f} MB together")
        write_merged(result, weights, folder)
        tell("asking the trainer and the written model the same")
        for check in _examine(result, weights, folder, sees):
            examined.append(check)
            if not check.passed:
                raise _refused(check, keep_refused(folder, path, examined))

    with result.run.held() if output is None else contextlib.nullcontext():
        write_folder(path, fill)
    whole = (
        ("the run trained the whole model: there is no adapter, and its weights are copied",) if result.whole else ()
    )
    notes = (*result.quantized_notes, *whole, *sight_notes(sees))
    return MergedModel(path, dtype, tuple(examined), notes, sees)


def _examine(result: Result, weights: ModelFiles, folder: Path, sees: dict[str, float]) -> Iterator[Check]:
    wrong = next(weights.differences(Files(weight_files(folder))), "")
    yield Check("file", f"{len(weights.base.names())} weights", "every weight byte for byte what was merged", wrong)
    context = read_shape(result.folder).context_length
    baseline = compute_baseline(result.open(), result.prompts(), STEPS, result.encoder.stop_ids, context)
    drift = baseline.drift(ask_folder(folder.resolve(), baseline.request, otherwise=result.config.backend))
    bounds = result.bounds(baseline.session, baseline.sequences)
    bound = bounds.of(weights.rounding, weights.storages)
    found = problems(drift, bound)
    yield Check(
        "fresh process",
        f"{drift.questions - len(drift.mismatches)} of {drift.questions} answers equal, max log-prob error "
        f"{drift.distance or 0.0:.2g} (in logit std) over {drift.places} positions",
        f"equal, or diverging at a near-tie; at most {bound.distance:.2g}, {bound.why}",
        next(iter(found), ""),
    )
    sees.update(bounds.sight(bound))


def _refused(check: Check, kept: Path) -> ExportError:
    return ExportError(
        f"the model was written, but at the stage {check.stage!r} it is not what was trained: {check.first}; it is "
        f"kept as {kept.name}, with its report beside it",
        hint="this is a fault of FineTune or of transformers: please report it with the model's config.json",
    )
