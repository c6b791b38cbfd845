"""The kill matrix as a page: which laws caught the faults of which stage, and each fault with its example."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from finetune.report.html import page_template
from finetune.report.numbers import say_count, say_percent, say_seconds

_WORDS = {"killed": "killed", "survived": "survived", "equivalent": "changed nothing", "error": "not judged"}


def render_matrix(proof: Mapping[str, Any]) -> str:
    """Render one self-contained page from the values of a `proof.json`; the same values give the same bytes."""
    faults = proof["faults"]
    count = len(faults)
    killed = proof["counts"]["killed"]
    tiles = [
        ("Faults killed", f"{say_count(killed)} of {say_count(count)}", say_percent(killed / count) if count else ""),
        ("Survived", say_count(proof["counts"]["survived"]), "changed an answer, and no law broke"),
        ("Changed nothing", say_count(proof["counts"]["equivalent"]), "no law asked for what they change"),
        ("Not judged", say_count(proof["counts"]["error"]), "not planted, never called, or seen in errors alone"),
        (
            "False alarms",
            f"{len(proof['false_alarms'])} of {say_count(proof['clean_runs'])}",
            f"at most {say_percent(proof['false_alarm_bound'])} of clean runs, with 95% confidence",
        ),
    ]
    return page_template("matrix.html.j2").render(
        title=f"Kill matrix, tier {proof['tier']}",
        lead=f"{say_count(len(proof['laws']))} laws, {say_seconds(proof['seconds'])} in all",
        tiles=tiles,
        stop_after=proof["stop_after"],
        table=_table(faults),
        rows=[_row(fault) for fault in faults],
        idle=proof["idle"],
        alarms=proof["false_alarms"],
    )


def _table(faults: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stages in rows and families of laws in columns: which family caught how many of a stage's faults first.

    Both are in the order of how many they are of, so that what is caught where is seen at once.
    """
    first = [(fault["stage"], fault["laws"][0].partition(".")[0]) for fault in faults if fault["laws"]]
    families, most = Counter(family for _, family in first), max(Counter(first).values(), default=1)
    pairs: dict[tuple[str, str], list[str]] = {}
    for fault in faults:
        for law in fault["laws"][:1]:
            pairs.setdefault((fault["stage"], law.partition(".")[0]), []).append(f"{fault['slug']}: {law}")
    stages = Counter(fault["stage"] for fault in faults)
    rows = []
    for stage, count in stages.most_common():
        killed = sum(fault["status"] == "killed" for fault in faults if fault["stage"] == stage)
        caught = [pairs.get((stage, family), []) for family, _ in families.most_common()]
        cells = [{"count": len(each), "tip": "\n".join(each), "shade": ceil(4 * len(each) / most)} for each in caught]
        rows.append({"stage": stage, "killed": killed, "count": count, "cells": cells})
    return {"families": families.most_common(), "rows": rows}


def _row(fault: Mapping[str, Any]) -> dict[str, Any]:
    example = fault["example"]
    case = example and example["case"]
    return {
        "id": fault["fault"],
        "slug": fault["slug"],
        "what": fault["what"],
        "real": fault["real"],
        "outcome": _WORDS[fault["status"]],
        "kind": "passed" if fault["status"] == "killed" else "failed",
        "laws": fault["laws"],
        "seconds": say_seconds(fault["seconds_to_kill"]) if fault["seconds_to_kill"] is not None else "",
        "expected": example["expected"] if case else "",
        "got": example["got"] if case else fault["reason"] or (example["why"] if example else ""),
        "case": json.dumps(case, ensure_ascii=False) if case else "",
    }
