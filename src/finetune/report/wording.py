"""The sentences and figures of a report, said once for the page, the comparison and the terminal alike."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePath
from typing import Any

from finetune.records import Outcome
from finetune.report.numbers import NOT_MEASURED, as_number, say_bytes, say_count, say_number, say_percent, say_seconds

_HASH = re.compile(r"-[0-9a-f]{16}$")
# Every outcome has its own symbol, so that no reader depends on colour.
SYMBOLS = {"passed": "✓", "failed": "✗", "inconclusive": "?", "not applicable": "–", "error": "!", "not judged": "·"}
ASCII_SYMBOLS = SYMBOLS | {"passed": "+", "failed": "x", "not applicable": "-", "not judged": "."}


@dataclass(frozen=True, slots=True)
class Figure:
    """One headline figure: what it is, its value in words, and the detail or the reason of its absence."""

    label: str
    value: str
    detail: str

    @property
    def measured(self) -> bool:
        """Whether there is a value at all."""
        return self.value != NOT_MEASURED


def say_title(report: Mapping[str, Any]) -> str:
    """The model and the rows it was trained on, in one line; the first data file holds those rows."""
    headline = report["headline"]
    data = f" on {PurePath(headline['data'][0]).name}" if headline["data"] else ""
    name = headline["model"] or "unnamed model"
    if PurePath(name).is_absolute():  # of one that was imported, without the hash that keeps its folder apart
        name = _HASH.sub("", PurePath(name).name)
    return f"{name}{data}"


def say_start(report: Mapping[str, object]) -> str | None:
    """When the run began, to the minute; as written when that is not an ISO date."""
    written = report["started"]
    try:
        start = datetime.fromisoformat(str(written))
    except ValueError:
        return None if written is None else str(written)
    return f"{start:%Y-%m-%d %H:%M} {start:%Z}".rstrip()


def say_counts(report: Mapping[str, Any]) -> str:
    """How many criteria passed; of open answers, how many claims hold."""
    criteria = report["criteria"]
    if claims := _counted_claims(criteria):
        hold = sum(one["outcome"] in (Outcome.PASSED, Outcome.NOT_APPLICABLE) for one in claims)
        return f"{hold} of {len(claims)} claims of the goal {report['goal']} hold"
    passed = sum(item["outcome"] == Outcome.PASSED for item in criteria)
    return f"{passed} of {len(criteria)} criteria passed"


def _counted_claims(criteria: Any) -> list[Mapping[str, Any]]:
    claims = [one for item in criteria for one in item["companions"] if str(one.get("id")).startswith("claim-")]
    return [one for one in claims if one.get("counts", True)]


def say_outcome(report: Mapping[str, Any]) -> str:
    """How many of the five criteria passed and which did not, in one sentence; of open answers, which claims hold."""
    criteria = report["criteria"]
    if counted := _counted_claims(criteria):
        hold = [one["title"] for one in counted if one["outcome"] in (Outcome.PASSED, Outcome.NOT_APPLICABLE)]
        rest = [f"{one['outcome']}: {one['title']}" for one in counted if one["title"] not in hold]
        first = f"{len(hold)} of {len(counted)} claims of the goal {report['goal']} hold"
        return f"{'; '.join([first, *rest])}."
    failing = {
        word: [item["title"].lower() for item in criteria if item["outcome"] == word]
        for word in (Outcome.FAILED, Outcome.ERROR, Outcome.INCONCLUSIVE)
    }
    if not any(item["outcome"] for item in criteria):
        return "No criterion was judged in this run."
    passed = sum(item["outcome"] == Outcome.PASSED for item in criteria)
    parts = [f"{word}: {', '.join(titles)}" for word, titles in failing.items() if titles]
    idle = [item["title"].lower() for item in criteria if item["outcome"] in (None, Outcome.NOT_APPLICABLE)]
    if idle:
        parts.append(f"not judged or not applicable: {', '.join(idle)}")
    head = f"{'All' if passed == len(criteria) else f'{passed} of'} {len(criteria)} criteria passed"
    return f"{head}{'; ' if parts else ''}{'; '.join(parts)}."


def headline_figures(report: Mapping[str, Any]) -> list[Figure]:
    """The figures a reader looks for first, always the same eight in the same order."""
    headline, absent, unit = report["headline"], report["absent"], loss_unit(report)
    return [
        _score(report, "learning", "Trained questions right"),
        _score(report, "retention", "Other questions right"),
        _losses(headline["fixed_loss"], "Loss on fixed batches", absent["fixed"], unit),
        _losses(headline["held_out_loss"], "Loss on held-out rows", absent["held_out"], unit),
        _trainable(headline),
        _memory(report),
        _tokens(report),
        _time(headline),
    ]


def _score(report: Mapping[str, Any], name: str, label: str) -> Figure:
    tally = report["scores"][name]
    base, tuned, control = tally["base"], tally["tuned"], tally["control"]
    if not base or not tuned:
        return Figure(label, NOT_MEASURED, report["absent"][name])
    compared = f"; shuffled-label control {control['right']} of {control['of']}" if control else ""
    detail = f"{say_percent(base['share'])} before, {say_percent(tuned['share'])} after{compared}"
    of = f"{tuned['of']}" if base["of"] == tuned["of"] else f"{base['of']} and {tuned['of']}"
    return Figure(label, f"{base['right']} → {tuned['right']} of {of}", detail)


def loss_unit(report: Mapping[str, Any]) -> str:
    """What a loss is counted in: that of pairs is one number a pair."""
    return "nats per pair" if report["goal"] == "preference" else "nats per token"


def _losses(losses: Mapping[str, Any] | None, label: str, why: str, unit: str) -> Figure:
    before, after = (losses["before"], losses["after"]) if losses else (None, None)
    if before is None or after is None:
        return Figure(label, NOT_MEASURED, why if losses is None else "The loss was not a finite number.")
    change = f"{say_percent(abs(after / before - 1))} {'lower' if after <= before else 'higher'}, " if before else ""
    return Figure(label, f"{say_number(before)} → {say_number(after)}", f"{change}{unit}")


def _trainable(headline: Mapping[str, Any]) -> Figure:
    label = "Trainable parameters"
    if headline["trainable_parameters"] is None:
        return Figure(label, NOT_MEASURED, "run.json holds no count of trainable parameters.")
    detail = f"{say_percent(headline['trainable_share'])} of {say_count(headline['parameters'])}"
    return Figure(label, say_count(headline["trainable_parameters"]), detail)


def _memory(report: Mapping[str, Any]) -> Figure:
    label, headline = "Memory against full", report["headline"]
    saving = headline["memory_saving"]
    if saving is None:
        return Figure(label, NOT_MEASURED, report["absent"]["memory"])
    peaks = {measure["method"]: say_bytes(measure["peak_tensors"]) for measure in report["memory"]}
    word = "less" if saving >= 0 else "more"
    detail = f"peak live tensors {peaks['lora']} with LoRA, {peaks['full']} in full"
    return Figure(label, f"{say_percent(abs(saving))} {word}", detail)


def _tokens(report: Mapping[str, Any]) -> Figure:
    counts = report["data"]["counts"]["train"]
    label = "Tokens trained on"
    if not counts or as_number(counts.get("trained_tokens")) is None:
        return Figure(label, NOT_MEASURED, report["absent"]["counts"])
    detail = f"of {say_count(counts.get('tokens'))} tokens in {say_count(counts.get('kept'))} rows"
    return Figure(label, say_count(counts["trained_tokens"]), detail)


def _time(headline: Mapping[str, Any]) -> Figure:
    if headline["seconds"] is None:
        return Figure("Time", NOT_MEASURED, "run.json holds no timing.")
    rate, peak = headline["tokens_per_second"], headline["peak_rss_bytes"]
    parts = [f"{say_count(rate)} tokens per second"] if rate is not None else []
    parts += [f"process peak {say_bytes(peak)}"] if peak is not None else []
    return Figure("Time", say_seconds(headline["seconds"]), ", ".join(parts) or "speed and peak were not measured")
