"""Everything a run proved, in one JSON value that other programs can read: verdicts, scores, losses, memory, data."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.intervals import wilson_interval
from finetune.records import Outcome
from finetune.report.numbers import as_number

CRITERIA = {1: "Loss convergence", 2: "Model learning", 3: "Memory efficiency", 4: "Parameter updates", 5: "Artifacts"}
_LOSS_FIELDS = {
    "train": ("step", "loss", "learning_rate", "grad_norm"),
    "fixed": ("step", "loss", "tokens"),
    "held_out": ("step", "loss", "tokens"),
}
_ABSENT = {
    "learning": "run.json holds no answers to the trained questions: the model was not questioned before and after.",
    "retention": "run.json holds no answers to questions outside the training data: retention was not examined.",
    "train": "run.json holds no training losses: the run recorded no optimizer step.",
    "fixed": "run.json holds no loss on the same fixed batches before and after training.",
    "held_out": "No validation split: set data.valid or data.valid_fraction.",
    "memory": "run.json holds no memory measurement: LoRA and full fine-tuning were not run in fresh processes.",
    "counts": "run.json holds no row counts for this data.",
    "verdict": "No judge spoke on this criterion in this run.",
}


def build_report(run: Mapping[str, object]) -> dict[str, Any]:
    """Turn run.json into report.json: the same facts, grouped by what a reader asks.

    Absent facts are None or empty and `absent` says why in a sentence; numbers that are not finite become None
    and are told in `notes`, so that the result is strict JSON.
    """
    criteria = _criteria(list_at(run, "verdicts"))
    losses = {name: _series(list_at(map_at(run, "losses"), name), fields) for name, fields in _LOSS_FIELDS.items()}
    scores = map_at(run, "scores")
    memory = [_memory(map_at(map_at(run, "memory"), method), method) for method in ("lora", "full")]
    judged = [criterion["outcome"] for criterion in criteria if criterion["outcome"]]
    report = {
        "format": 2,
        "id": str(run.get("id") or "unnamed run"),
        "status": str(run.get("status") or "unknown"),
        "started": run.get("started"),
        "folder": run.get("folder"),
        "outcome": run.get("outcome") or Outcome.worst(judged),
        "criteria": criteria,
        "goal": run.get("goal"),
        "headline": _headline(run, losses, memory),
        "scores": {name: _tally(map_at(scores, name)) for name in ("learning", "retention")},
        "answers": {name: _paired(map_at(scores, name)) for name in ("learning", "retention")},
        "losses": losses,
        "memory": [measure for measure in memory if measure],
        "data": _data(map_at(run, "data")),
        "training": dict(map_at(run, "training")),
        "timing": dict(map_at(run, "timing")),
        "repeat": _repeat(run),
        "advice": [str(advice) for advice in list_at(run, "advice")],
        "notes": [
            *(f"What to try: {advice}." for advice in list_at(run, "advice")),
            *(str(note) for note in list_at(run, "notes")),
            *_not_finite(map_at(run, "losses")),
        ],
        "absent": _ABSENT | {key: f"{why[:1].upper()}{why[1:]}." for key, why in map_at(run, "not_measured").items()},
    }
    return {key: _strict(value) for key, value in report.items()}


def map_at(value: Mapping[str, object], key: str) -> Mapping[str, Any]:
    """The object under a key; empty when it is absent or null."""
    found = value.get(key)
    return found if isinstance(found, Mapping) else {}


def list_at(value: Mapping[str, object], key: str) -> Sequence[Any]:
    """The list under a key; empty when it is absent or null."""
    found = value.get(key)
    return found if isinstance(found, list | tuple) else ()


def _criteria(verdicts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups = []
    for number, title in CRITERIA.items():
        members = [dict(verdict) for verdict in verdicts if verdict.get("criterion") == number]
        for member in members:
            word = str(member.get("outcome"))
            member["outcome"] = Outcome(word) if word in set(Outcome) else Outcome.INCONCLUSIVE
            if not member.get("counts", True):
                member["title"] = f"{member.get('title') or title} (shown, does not count)"
        groups.append(
            {
                "criterion": number,
                "title": title,
                "outcome": Outcome.worst(member["outcome"] for member in members if member.get("counts", True)),
                "literal": [member for member in members if not member.get("companion")],
                "companions": [member for member in members if member.get("companion")],
            }
        )
    return groups


def _series(points: Sequence[Mapping[str, object]], fields: Sequence[str]) -> list[dict[str, float | None]]:
    return [{field: as_number(point.get(field)) for field in fields} for point in points]


def _not_finite(losses: Mapping[str, object]) -> list[str]:
    """One sentence for each loss series that left the finite numbers, with the first step where it did."""
    notes = []
    for name, words in (("train", "training"), ("fixed", "fixed-batch"), ("held_out", "held-out")):
        values = [(point.get("step"), point.get("loss")) for point in list_at(losses, name)]
        bad = [step for step, loss in values if isinstance(loss, float) and not math.isfinite(loss)]
        if bad:
            notes.append(f"The {words} loss was not a finite number at {len(bad)} step(s), first at step {bad[0]}.")
    return notes


def _headline(
    run: Mapping[str, Any], losses: Mapping[str, list[dict[str, Any]]], memory: Sequence[dict[str, Any] | None]
) -> dict[str, Any]:
    model = map_at(run, "model")
    parameters, trainable = as_number(model.get("parameters")), as_number(model.get("trainable_parameters"))
    lora, full = memory
    seconds = as_number(map_at(run, "timing").get("total"))
    saving = 1 - lora["peak_tensors"] / full["peak_tensors"] if lora and full and full["peak_tensors"] else None
    return {
        "model": model.get("name"),
        "data": [str(map_at({"file": file}, "file").get("path")) for file in list_at(map_at(run, "data"), "files")],
        "parameters": parameters,
        "trainable_parameters": trainable,
        "trainable_share": trainable / parameters if trainable is not None and parameters else None,
        "fixed_loss": _before_after(losses["fixed"]),
        "held_out_loss": _before_after(_up_to(losses["held_out"], map_at(run, "training").get("kept_step"))),
        "steps": max((point["step"] or 0 for point in losses["train"]), default=None),
        "kept_step": as_number(map_at(run, "training").get("kept_step")),
        "memory_saving": saving,
        "seconds": seconds,
        "tokens_per_second": as_number(map_at(run, "throughput").get("tokens_per_second")),
        "peak_rss_bytes": as_number(run.get("peak_rss_bytes")),
    }


def _up_to(points: Sequence[Mapping[str, Any]], kept: object) -> Sequence[Mapping[str, Any]]:
    """The points up to the step whose weights were kept: later ones say nothing of the adapter."""
    step = as_number(kept)
    return points if step is None else [point for point in points if (point["step"] or 0) <= step]


def _before_after(points: Sequence[Mapping[str, object]]) -> dict[str, Any] | None:
    """First and last measurement; None where there is only one."""
    return {"before": points[0]["loss"], "after": points[-1]["loss"]} if len(points) > 1 else None


def _tally(sets: Mapping[str, object]) -> dict[str, dict[str, Any] | None]:
    """Right answers of each model with the share and its 95% interval."""
    tallies: dict[str, dict[str, Any] | None] = {}
    for model in ("base", "tuned", "control"):
        answers = list_at(map_at(sets, model), "answers")
        right, of = sum(bool(answer.get("right")) for answer in answers), len(answers)
        low, high = wilson_interval(right, of) if of else (0.0, 0.0)
        tallies[model] = {"right": right, "of": of, "share": right / of, "low": low, "high": high} if of else None
    return tallies


def _paired(sets: Mapping[str, object]) -> list[dict[str, Any]]:
    """The answers of base, tuned and control to the same question side by side.

    They meet by question and by how often it came before, not by position: a model that was asked fewer
    questions must not have its answers shown under the wrong ones.
    """
    pairs: dict[tuple[str, int], dict[str, Any]] = {}
    for model in ("base", "tuned", "control"):
        seen: dict[str, int] = {}
        for answer in list_at(map_at(sets, model), "answers"):
            question = str(answer.get("question", ""))
            place = seen[question] = seen.get(question, 0) + 1
            pair = pairs.setdefault(
                (question, place),
                {
                    "question": question,
                    "expected": answer.get("expected"),
                    "base": None,
                    "tuned": None,
                    "control": None,
                },
            )
            pair[model] = {"given": answer.get("given"), "right": bool(answer.get("right"))}
    return [{**pair, "change": _change(pair)} for pair in pairs.values()]


def _change(pair: Mapping[str, Any]) -> str:
    if not pair["base"] or not pair["tuned"]:
        return "not compared"
    before, after = pair["base"]["right"], pair["tuned"]["right"]
    return ("still right" if after else "worsened") if before else ("improved" if after else "still wrong")


def _memory(measure: Mapping[str, object], method: str) -> dict[str, Any] | None:
    """The measured peak of one process, cut into parts that add up to its live tensors."""
    peak = as_number(measure.get("peak_tensors"))
    if peak is None:
        return None
    parts = {part: as_number(measure.get(f"{part}_bytes")) or 0.0 for part in ("weight", "gradient", "optimizer")}
    peak_rss, framework = as_number(measure.get("peak_rss")), as_number(measure.get("framework_rss"))
    return {
        "method": method,
        # Parts are measured one by one, the peak at another moment: the rest may come out a little below zero.
        "parts": {**parts, "rest": max(0.0, peak - sum(parts.values()))},
        "peak_tensors": peak,
        "rss_above_framework": peak_rss - framework if peak_rss is not None and framework is not None else None,
        **{key: measure.get(key) for key in ("batch_size", "length", "dtype", "steps")},
    }


def _data(data: Mapping[str, object]) -> dict[str, Any]:
    counts = {name: dict(map_at(data, name)) or None for name in ("train", "valid", "rehearsal")}
    return {"files": [dict(file) for file in list_at(data, "files")], "counts": counts}


def _repeat(run: Mapping[str, object]) -> dict[str, Any]:
    """What somebody else needs to run the same again and to see that it is the same."""
    return {
        "command": run.get("command"),
        "seeds": dict(map_at(run, "seeds")),
        "versions": dict(map_at(run, "versions")),
        "machine": dict(map_at(run, "machine")),
        "plan": [dict(item) for item in list_at(run, "plan")],
        "model": {key: value for key, value in map_at(run, "model").items() if key != "files"},
        "model_files": [dict(file) for file in list_at(map_at(run, "model"), "files")],
        "artifacts": [dict(file) for file in list_at(run, "artifacts")],
    }


def _strict(value: object) -> Any:
    """The value with every non-finite float as None: NaN is not JSON, and other programs refuse the file."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
