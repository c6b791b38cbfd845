"""What `run.json` holds, as far as it is read again: a file that was changed or damaged is refused by its place.

What a run did not measure is absent or null; what is there has its type, so that no reader meets another one.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.config import FORMAT
from finetune.records import Outcome

_SHOWN = 5
Text = str | None
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)] | None
Number = float | None  # NaN too: a run may tell of it
Answer = str | list[str] | None


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class _Hashed(_Strict):
    path: str
    sha256: Text = None
    bytes: Whole = None


class _Point(_Strict):
    step: Whole = None
    loss: Number = None
    tokens: Number = None
    learning_rate: Number = None
    grad_norm: Number = None


class _Losses(_Strict):
    train: list[_Point] | None = None
    fixed: list[_Point] | None = None
    held_out: list[_Point] | None = None


class _Answered(_Strict):
    question: Text = None
    expected: Answer = None
    given: Answer = None
    right: bool | None = None


class _Answers(_Strict):
    answers: list[_Answered] | None = None


class _AskedOf(_Strict):
    base: _Answers | None = None
    tuned: _Answers | None = None
    control: _Answers | None = None


class _Lengths(_Strict):
    shortest: Whole = None
    median: Number = None
    most: Whole = None
    longest: Whole = None
    steps: list[list[int]] | None = None


class _Counts(_Strict):
    read: Whole = None
    kept: Whole = None
    truncated: Whole = None
    tokens: Whole = None
    trained_tokens: Whole = None
    dropped: dict[str, int] | None = None
    dropped_at: dict[str, str] | None = None
    shapes: dict[str, int] | None = None
    sources: dict[str, int] | None = None
    lengths: _Lengths | None = None


class _Shared(_Strict):
    text: str
    rows: int


class _Data(_Strict):
    files: list[_Hashed] | None = None
    train: _Counts | None = None
    valid: _Counts | None = None
    rehearsal: _Counts | None = None
    system: _Shared | None = None
    tools: _Shared | None = None
    variables: _Shared | None = None


class _Model(_Strict):
    name: Text = None
    source: Text = None
    parameters: Whole = None
    trainable_parameters: Whole = None
    context_length: Whole = None
    files: list[_Hashed] | None = None


class _Verdict(_Strict):
    outcome: Literal[tuple(Outcome)]  # type: ignore[valid-type]  # its words, as JSON has them
    id: Text = None
    title: Text = None
    criterion: Whole = None
    measured: Text = None
    allowed: Text = None
    reason: Text = None
    companion: bool | None = None
    counts: bool | None = None
    numbers: dict[str, Any] | None = None


class _Training(_Strict):
    steps: Whole = None
    kept_step: Whole = None
    stopped_early: bool | None = None


class _Setting(_Strict):
    key: str
    value: Any = None


class _Manifest(_Strict):
    format: Literal[FORMAT]  # type: ignore[valid-type]
    model: _Model
    data: _Data
    losses: _Losses
    versions: dict[str, Text]
    plan: list[_Setting]
    verdicts: list[_Verdict]
    notes: list[str]
    id: Text = None
    status: Text = None
    outcome: Text = None
    goal: Text = None
    started: Text = None
    command: Text = None
    artifacts: list[_Hashed] | None = None
    training: _Training | None = None
    scores: dict[str, _AskedOf | None] | None = None
    memory: dict[str, dict[str, Any] | None] | None = None
    timing: dict[str, Number] | None = None
    machine: dict[str, Any] | None = None
    seeds: dict[str, Any] | None = None
    not_measured: dict[str, str] | None = None
    advice: list[str] | None = None
    peak_rss_bytes: Whole = None


def check_manifest(value: object) -> None:
    """Raise ValueError where a value is not what `run.json` of this version holds, with each place that is wrong."""
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, not an object")
    try:
        _Manifest.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False)
        told = [
            f"{'.'.join(map(str, each['loc']))}: {each['msg'].lower()}, and it is {repr(each['input'])[:40]}"
            for each in found[:_SHOWN]
        ]
        more = [f"and {len(found) - _SHOWN:,} more"] if len(found) > _SHOWN else []
        raise ValueError("; ".join([*told, *more])) from None
