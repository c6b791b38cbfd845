"""Holds every way to compute what a run has trained to the trainer: the same questions, one row a way."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from finetune.backends import open_backend
from finetune.compare.paths import CallablePath, GgufPaths, backend_path, merged_path, open_gguf_paths
from finetune.errors import EvidenceError, ExportError, FineTuneError, RefusedError, UsageError
from finetune.evidence.answers import score
from finetune.evidence.baseline import Baseline, compute_baseline
from finetune.evidence.drift import Drift, Ids, InferencePath, InferenceResponse, problems
from finetune.export.outtypes import OUTTYPES, Outtype
from finetune.export.result import Result, open_result
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
PATHS = (TRAINER, "merged", *BACKENDS, *(f"gguf-{outtype}" for outtype in OUTTYPES), SERVER)
"""The ways there are, in the order in which they are asked."""
STEPS_WITHOUT_QUESTIONS = 24
KL = "KL divergence in nats from the trainer's distribution, over every id that the way tells and the rest as one"
Teller = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PathResult:
    """What one path gave; `reason` says why it failed or does not apply, and the baseline has no outcome."""

    way: str
    what: str
    outcome: Outcome | None
    reason: str = ""
    bound: float | None = None
    right: dict[str, int] = field(default_factory=dict)
    drift: Drift | None = None


@dataclass(frozen=True, slots=True)
class Equivalence:
    """All ways next to each other; `asked` counts the questions of each set, `tokens` the places compared."""

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
        """All of it as JSON values."""
        ways = [{**asdict(row), "baseline": row.outcome is None} for row in self.rows]
        for way in ways:
            for parting in (way["drift"] or {}).get("partings", []):
                parting["own_text"] = self.texts.get(parting["own"], "")
                parting["their_text"] = self.texts.get(parting["theirs"], "")
        return {
            "format": FORMAT,
            "run": self.run,
            "outcome": self.outcome,
            "trainer": self.trainer,
            "asked": self.asked,
            "tokens": self.tokens,
            "kl": KL,
            "ways": ways,
            "notes": list(self.notes),
        }


def compare_paths(
    run: Path, through: Sequence[str] = PATHS, *, more: Sequence[InferencePath] = (), tell: Teller = lambda words: None
) -> Equivalence:
    """Ask every way the run's questions, hold it to the trainer, and write `equivalence.json` into the run's folder.

    Args:
        through: names of ways; the trainer is always asked.
        more: ways beside those that have names here.
        tell: is told what is done.

    Raises:
        FineTuneError: the run cannot be opened, or there was no way that could be held to the trainer.
    """
    if unknown := sorted(set(through) - set(PATHS)):
        raise UsageError(f"there is no way {unknown[0]!r}", hint=f"choose from: {', '.join(PATHS)}")
    result = open_result(run, open_backend)
    with result.run.held():
        comparison = _Comparison.begin(result, through)
        tell(f"asking the trainer {len(comparison.baseline.request.prompts)} questions")
        rows = [comparison.trainer()]
        for row in comparison.rows(through, more):
            tell(f"{row.way}: {row.outcome}" + (f": {row.reason}" if row.reason else ""))
            rows.append(row)
        if all(row.outcome in (None, Outcome.NOT_APPLICABLE) for row in rows):
            told = "; ".join(f"{row.way}: {row.reason}" for row in rows[1:]) or "only the trainer was asked for"
            raise EvidenceError(f"no way could be held to the trainer ({told})", hint="name others with --through")
        found = comparison.finish(tuple(rows))
        write_json(result.run.path / "equivalence.json", found.as_dict())
    return found


@dataclass(frozen=True)
class _Comparison:
    result: Result
    prepared: Prepared
    questions: dict[str, tuple[Question, ...]]
    gguf: GgufPaths | RefusedError | None
    baseline: Baseline

    @classmethod
    def begin(cls, result: Result, through: Sequence[str]) -> "_Comparison":
        """Let the trainer answer."""
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
        return cls(result, prepared, questions, gguf, baseline)

    def trainer(self) -> PathResult:
        """The trainer's own row."""
        what = f"the {self.result.config.backend} backend, adapter on its base, float32"
        return PathResult(TRAINER, what, None, right=self._right(self.baseline.request.path))

    def rows(self, through: Sequence[str], more: Sequence[InferencePath]) -> Iterator[PathResult]:
        """One row for each way, or more where there are several files of a kind."""
        for name in (name for name in PATHS if name in through and name != TRAINER):
            if name == self.result.config.backend:
                continue  # the trainer itself
            try:
                ways = self._ways(name)
            except FineTuneError as error:
                yield _failed(name, "", error)
                continue
            yield from map(self._judge, ways)
        yield from map(self._judge, more)

    def _ways(self, name: str) -> tuple[CallablePath, ...]:
        if name in BACKENDS:
            return (backend_path(self.result, name),)
        if name == "merged":
            return (merged_path(self.result),)
        if isinstance(self.gguf, GgufPaths) and name == SERVER:
            return self.gguf.served(conversations_of(self.result.encoder, self.prepared))
        if isinstance(self.gguf, GgufPaths):
            outtype: Outtype = next(known for known in get_args(Outtype) if name == f"gguf-{known}")
            return self.gguf.of(outtype)
        assert self.gguf is not None
        raise self.gguf

    def _judge(self, way: InferencePath) -> PathResult:
        what = str(getattr(way, "what", way.name))
        try:
            told: InferenceResponse = way.ask(self.baseline.request)
        except FineTuneError as error:
            return _failed(way.name, what, error)
        drift = self.baseline.drift(told)
        found = problems(drift, way.bound)
        return PathResult(
            way.name, what, Outcome.of(not found), "; ".join(found), way.bound, self._right(told.ids), drift
        )

    def _right(self, answers: Sequence[Ids]) -> dict[str, int]:
        """How many answers are right, scored as the run's own are."""
        right, start = {}, 0
        for name, group in self.questions.items():
            if group:
                said = answers[start : start + len(group)]
                right[name] = score(group, said, self.result.encoder.tokenizer.decode).right
                start += len(group)
        return right

    def finish(self, rows: tuple[PathResult, ...]) -> Equivalence:
        """All rows together."""
        result, config = self.result, self.result.config
        ids = {token for row in rows if row.drift for p in row.drift.partings for token in (p.own, p.theirs)}
        notes = list(result.quantized_notes)
        if config.model.dtype != "float32":
            notes.append(f"the run computed in {config.model.dtype}; here the trainer computes in float32")
        return Equivalence(
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
