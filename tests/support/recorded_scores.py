"""What Tier 2 adds to the history of the tests: how well each model learned with each backend."""

from collections.abc import Callable, Mapping
from typing import Any

from finetune.report import build_report


def record_scores(record: Callable[[str, object], None], run: Mapping[str, Any], *, backend: str) -> None:
    """Record what this run measured; what it did not measure is not recorded."""
    report = build_report(run)
    headline, scores = report["headline"], report["scores"]
    measured = {
        f"{words}, {model}": scores[group][model]["share"]
        for group, words in (("learning", "new facts"), ("retention", "old facts"))
        for model in ("base", "tuned", "control")
        if scores[group].get(model)
    }
    losses = headline["fixed_loss"] or {}
    if losses.get("before") and losses.get("after") is not None:
        measured["loss reduction"] = 1 - losses["after"] / losses["before"]
    if headline["memory_saving"] is not None:
        measured["memory reduction"] = headline["memory_saving"]
    for name, value in measured.items():
        record(f"score.{headline['model']}/{backend} {name}", value)
