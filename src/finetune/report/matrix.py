"""The kill matrix as a page: every fault against every law, as one picture, and each fault with its example."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.report.html import page_template
from finetune.report.numbers import say_count, say_percent, say_seconds

_CELL = 11
_LEFT, _TOP, _GAP = 250, 150, 6
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
        picture=_picture(faults, proof["laws"]),
        rows=[_row(fault) for fault in faults],
        idle=proof["idle"],
        alarms=proof["false_alarms"],
    )


def _picture(faults: Sequence[Mapping[str, Any]], laws: Sequence[str]) -> dict[str, Any]:
    """Where each cell, label and line of the picture is, in pixels; a gap parts the stages."""
    cells, labels, y, stage = [], [], float(_TOP), ""
    places = {law: _LEFT + number * _CELL for number, law in enumerate(laws)}
    for fault in faults:
        if stage and fault["stage"] != stage:
            y += _GAP
        stage = fault["stage"]
        labels.append({"y": y, "text": f"{fault['fault']} {fault['slug']}", "status": fault["status"]})
        hits = [law for law in fault["laws"] if law in places]
        cells += [{"x": places[law], "y": y, "tip": f"{fault['slug']}: {law}", "first": law == hits[0]} for law in hits]
        y += _CELL
    width = _LEFT + len(laws) * _CELL + 90
    return {
        "width": width,
        "height": y + 10,
        "size": _CELL - 1,
        "bottom": y,
        "left": _LEFT,
        "right": _LEFT + len(laws) * _CELL,
        "top": _TOP,
        "cells": cells,
        "labels": labels,
        "columns": [{"x": x + _CELL - 2, "text": law} for law, x in places.items()],
    }


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
