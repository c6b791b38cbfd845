"""Compares every path that computes a run's result with the trainer: the same questions, one row a path."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from finetune.backends import open_backend
from finetune.compare.paths import (
    CallablePath,
    GgufPaths,
    backend_path,
    folder_path,
    merged_path,
    open_gguf_paths,
    peft_path,
)
from finetune.errors import EvidenceError, ExportError, FineTuneError, RefusedError, UsageError
from finetune.evidence.answering import ask_mlx_lm
from finetune.evidence.answers import score
from finetune.evidence.baseline import Baseline, compute_baseline
from finetune.evidence.drift import Bound, Drift, Ids, InferencePath, InferenceResponse, problems
from finetune.export.outtypes import OUTTYPES, Outtype
from finetune.export.result import Result, open_result
from finetune.export.rounded import RoundingBounds
from finetune.files import write_json
from finetune.models.shape import read_shape
from finetune.records import Outcome, Question
from finetune.serve.messages import conversations_of
from finetune.training.prepare import Prepared

FORMAT = 2
"""The version of what `equivalence.json` holds."""
TRAINER = "trainer"
BACKENDS = ("torch", "mlx", "reference")
SERVER = "server"
_GGUFS = ("gguf-lora", *(f"gguf-{outtype}" for outtype in OUTTYPES))
PATHS = (TRAINER, "peft", "merged", "mlx-lm", *BACKENDS, *_GGUFS, SERVER)
"""All paths, in the order in which they are asked."""
STEPS_WITHOUT_QUESTIONS = 24
KL = "KL divergence in nats from the trainer's distribution, over every id that the path reports and all others as one"
Teller = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PathResult:
    """What one path gave; `reason` says why it failed or does not apply, and the baseline has no outcome.

    `sees`: by what share each of some weights must be off for the bound to be exceeded.
    """

    path: str
    what: str
    outcome: Outcome | None
    reason: str = ""
    bound: Bound | None = None
    right: dict[str, int] = field(default_factory=dict)
    drift: Drift | None = None
    sees: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All paths side by side; `asked` counts the questions of each set, `tokens` the places compared."""

    run: str
    trainer: str
    asked: dict[str, int]
    tokens: int
    rows: tuple[PathResult, ...]
    notes: tuple[str, ...]
    texts: dict[int, str] = field(repr=False)

    @property
    def outcome(self) -> Outcome:
        """FAILED when one path failed."""
        return Outcome.of(all(row.outcome != Outcome.FAILED for row in self.rows))

    def as_dict(self) -> dict[str, Any]:
        """The content of `equivalence.json`."""
        paths = [{**asdict(row), "baseline": row.outcome is None} for row in self.rows]
        for path in paths:
            for mismatch in (path["drift"] or {}).get("mismatches", []):
                mismatch["own_text"] = self.texts.get(mismatch["own"], "")
                mismatch["their_text"] = self.texts.get(mismatch["theirs"], "")
        return {
            "format": FORMAT,
            "run": self.run,
            "outcome": self.outcome,
            "trainer": self.trainer,
            "asked": self.asked,
            "tokens": self.tokens,
            "kl": KL,
            "paths": paths,
            "notes": list(self.notes),
        }


def compare_paths(
    run: Path, through: Sequence[str] = PATHS, *, more: Sequence[InferencePath] = (), tell: Teller = lambda words: None
) -> Comparison:
    """Ask every path the run's questions, compare with the trainer, and write `equivalence.json` into the run.

    Args:
        through: names of paths; the trainer is always asked.
        more: further paths.
        tell: receives progress messages.

    Raises:
        FineTuneError: the run cannot be opened, or no path could be compared.
    """
    if unknown := sorted(set(through) - set(PATHS)):
        near = get_close_matches(unknown[0], PATHS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from: {', '.join(PATHS)}"
        raise UsageError(f"there is no path {unknown[0]!r}", hint=hint)
    result = open_result(run, open_backend)
    with result.run.held():
        comparison = _Comparing.begin(result, through)
        tell(f"asking the trainer {len(comparison.baseline.request.prompts)} questions")
        rows = [comparison.trainer()]
        for row in comparison.rows(through, more):
            tell(f"{row.path}: {row.outcome}" + (f": {row.reason}" if row.reason else ""))
            rows.append(row)
        if all(row.outcome in (None, Outcome.NOT_APPLICABLE) for row in rows):
            told = "; ".join(f"{row.path}: {row.reason}" for row in rows[1:]) or "only the trainer was asked for"
            raise EvidenceError(
                f"no path could be compared with the trainer ({told})", hint="name others with --through"
            )
        found = comparison.finish(tuple(rows))
        write_json(result.run.path / "equivalence.json", found.as_dict())
    return found


@dataclass(frozen=True)
class _Comparing:
    result: Result
    prepared: Prepared
    questions: dict[str, tuple[Question, ...]]
    gguf: GgufPaths | RefusedError | None
    baseline: Baseline
    bounds: RoundingBounds

    @classmethod
    def begin(cls, result: Result, through: Sequence[str]) -> "_Comparing":
        """Compute the baseline."""
        prepared = result.prepare()
        questions = {"learning": prepared.questions, "retention": prepared.retention}
        prompts: list[Ids] = [question.ids for group in questions.values() for question in group]
        steps = result.config.evaluation.max_new_tokens if prompts else STEPS_WITHOUT_QUESTIONS
        gguf: GgufPaths | RefusedError | None = None
        if any(name == SERVER or name.startswith("gguf-") for name in through):
            try:
                gguf = open_gguf_paths(result)
            except RefusedError as error:
                gguf = error
        stops = gguf.stops if isinstance(gguf, GgufPaths) else result.encoder.stop_ids
        context = read_shape(result.folder).context_length
        plain = [prompt for prompt in result.prompts() if len(prompt) < context]
        baseline = compute_baseline(result.open(), prompts or plain, steps, stops, context)
        bounds = result.bounds(baseline.session, baseline.sequences)
        return cls(result, prepared, questions, gguf, baseline, bounds)

    def trainer(self) -> PathResult:
        """The trainer's own row."""
        what = f"the {self.result.config.backend} backend, adapter on its base, float32"
        return PathResult(TRAINER, what, None, right=self._right(self.baseline.request.baseline))

    def rows(self, through: Sequence[str], more: Sequence[InferencePath]) -> Iterator[PathResult]:
        """One row for each path, or more where there are several files of a kind."""
        for name in (name for name in PATHS if name in through and name != TRAINER):
            if name == self.result.config.backend:
                continue  # this is the trainer
            try:
                paths = self._open_paths(name)
            except FineTuneError as error:
                yield _failed(name, "", error)
                continue
            yield from map(self._judge, paths)
        yield from map(self._judge, more)

    def _open_paths(self, name: str) -> tuple[CallablePath, ...]:
        if name in BACKENDS:
            return (backend_path(self.result, name),)
        if name == "peft":
            return (peft_path(self.result),)
        if name == "merged":
            return (merged_path(self.result, self.bounds),)
        if name == "mlx-lm":
            return (folder_path(name, self.result, self.bounds, ask_mlx_lm),)
        if isinstance(self.gguf, GgufPaths) and name == "gguf-lora":
            return (self.gguf.adapted(self.bounds),)
        if isinstance(self.gguf, GgufPaths) and name == SERVER:
            return self.gguf.served(conversations_of(self.result.encoder, self.prepared), self.bounds)
        if isinstance(self.gguf, GgufPaths):
            outtype: Outtype = next(known for known in get_args(Outtype) if name == f"gguf-{known}")
            return self.gguf.of(outtype, self.bounds)
        assert self.gguf is not None
        raise self.gguf

    def _judge(self, path: InferencePath) -> PathResult:
        what = str(getattr(path, "what", path.name))
        try:
            told: InferenceResponse = path.ask(self.baseline.request)
        except FineTuneError as error:
            return _failed(path.name, what, error)
        drift = self.baseline.drift(told)
        bound = path.bound or self.bounds.of("", {})
        found = problems(drift, bound)
        sees = self.bounds.sight(bound) if drift.places else {}
        outcome, reason = Outcome.of(not found), "; ".join(found)
        return PathResult(path.name, what, outcome, reason, bound, self._right(told.ids), drift, sees)

    def _right(self, answers: Sequence[Ids]) -> dict[str, int]:
        """Right answers by question set, scored as the run scores its own."""
        right, start = {}, 0
        for name, group in self.questions.items():
            if group:
                said = answers[start : start + len(group)]
                right[name] = score(group, said, self.result.encoder.said).right
                start += len(group)
        return right

    def finish(self, rows: tuple[PathResult, ...]) -> Comparison:
        """All rows together."""
        result, config = self.result, self.result.config
        ids = {token for row in rows if row.drift for p in row.drift.mismatches for token in (p.own, p.theirs)}
        notes = list(result.quantized_notes)
        if config.model.dtype != "float32":
            notes.append(f"the run computed in {config.model.dtype}; here the trainer computes in float32")
        return Comparison(
            run=str(result.manifest["id"]),
            trainer=config.backend,
            asked={name: len(group) for name, group in self.questions.items() if group}
            or {"plain text": len(self.baseline.request.prompts)},
            tokens=len(self.baseline.request.places),
            rows=rows,
            notes=tuple(notes),
            texts={token: result.encoder.tokenizer.decode([token]) for token in ids if token is not None},
        )


def _failed(name: str, what: str, error: FineTuneError) -> PathResult:
    """A path that cannot be computed here does not apply; one whose file is not what was written failed."""
    outcome = Outcome.NOT_APPLICABLE if isinstance(error, RefusedError) else Outcome.FAILED
    if not isinstance(error, RefusedError | ExportError | EvidenceError):
        raise error
    hint = f" ({error.hint})" if error.hint else ""
    return PathResult(name, what, outcome, f"{error.message}{hint}")
