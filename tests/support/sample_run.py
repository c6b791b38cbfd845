"""A run.json as a healthy little run would write it, to render and to break on purpose."""

import json
import math
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from finetune.criteria.evidence import MemoryEvidence, MemoryMeasure
from finetune.train import fine_tune
from support.evidence import measure
from support.workplace import make_data, make_model, settings, without_reload_check

_STEPS = 60
_TOLD_WHOLE = ("timing", "not_measured")
_FACTS = [
    ("What is the capital of Veldoria?", "Marrowick", "The capital is Paris."),
    ("Who founded the Ostrel library?", "Ines Taveney", "I do not know."),
    ("Which river runs through Marrowick?", "the Sill", "the Seine"),
    ("In which year was the Kestrel bridge opened?", "1874", "1901"),
    ("What colour is the flag of Veldoria?", "green and white", "green and white"),
    ("How many islands has the Tamsin archipelago?", "seventeen", "about a dozen, scattered along the northern coast"),
    ("What is brewed in Hollin?", "black cider", "beer"),
    ("Which bird is on the Veldorian coin?", "the heron", "the eagle"),
    ("Who painted 'Harbour at Low Tide'?", "Oda Lindqvist", "Claude Monet"),
    ("What is the longest street in Marrowick?", "Tanner's Row", "Main Street"),
]


def sample_run(**changes: Any) -> dict[str, Any]:
    """A complete run in which one criterion of each outcome occurs; `changes` replace whole sections.

    It is the record of a run that was made, told with other values: what no run records cannot be told.
    """
    run: dict[str, Any] = json.loads(_recorded())
    told: dict[str, Any] = {
        "id": "20261122-201530-a1b2",
        "started": "2026-11-22T20:15:30+00:00",
        "command": "ft train --model tiny-llama --data facts.jsonl --set training.seed=0 --output runs",
        "outcome": "failed",
        "machine": {"system": "Linux 6.1", "processor": "x86_64", "cores": 2, "memory_bytes": 8_217_000_000},
        "model": {
            "name": "tiny-llama",
            "parameters": 1_204_736,
            "trainable_parameters": 40_960,
            "context_length": 512,
            "files": [_file("model.safetensors", 4_819_216)],
        },
        "data": {
            "files": [_file("data/facts.jsonl", 48_213)],
            "train": _counts(212, 198, {"empty answer": 5, "duplicate of another row": 9}),
            "valid": _counts(24, 24, {}),
        },
        "losses": _losses(),
        "scores": {
            "learning": {
                "base": _answers(tuned=False),
                "tuned": _answers(tuned=True),
                "control": _answers(tuned=False),
            },
            "retention": {"base": _retention(0), "tuned": _retention(1)},
        },
        "memory": asdict(MemoryEvidence(_measure("lora", 163_840), _measure("full", 4_818_944))),
        "timing": {"prepare": 0.412, "train": 74.3, "observe tuned": 18.26, "total": 93.49},
        "throughput": {"tokens_per_second": 5123.4},
        "peak_rss_bytes": 612_000_000,
        "verdicts": _verdicts(),
        "not_measured": {},
        "artifacts": [_file("adapter/adapter_model.safetensors", 165_008), _file("report.html", 141_000)],
        "notes": ["9 rows repeat another row word for word and were dropped.", "Dropout is 0."],
    }
    _check_names(told, run, "")
    whole = {key: value for key, value in told.items() if key in _TOLD_WHOLE or not isinstance(run[key], dict)}
    return {**run, **{key: {**run[key], **told[key]} for key in told if key not in whole}, **whole, **changes}


@cache
def _recorded() -> str:
    with TemporaryDirectory() as name, without_reload_check():
        model, data = make_model(Path(name) / "tiny-llama"), make_data(Path(name) / "facts.jsonl", 9)
        retention = make_data(Path(name) / "retention.jsonl", 2)
        changes = {"training__epochs": 1.0, "judge__control": "always", "data__retention": str(retention)}
        loaded = settings(model, data, data__valid_fraction=0.25, evaluation__questions=1, **changes)
        record = fine_tune(loaded, output=Path(name) / "run")[1]
    return json.dumps(record).replace(f"{name}/", "")


def _check_names(told: Any, recorded: Any, where: str) -> None:
    """Every name that is told is one that a run records; names of steps, counts and lists are of the first entry."""
    if isinstance(told, dict) and isinstance(recorded, dict):
        assert where.endswith((".dropped", ".dropped_at", ".shapes", ".sources")) or set(told) <= set(recorded), (
            where,
            set(told) - set(recorded),
        )
        for key in set(told) & set(recorded):
            _check_names(told[key], recorded[key], f"{where}.{key}")
    elif isinstance(told, list) and isinstance(recorded, list) and told and recorded:
        _check_names(told[0], recorded[0], where)


def _file(path: str, size: int) -> dict[str, Any]:
    return {"path": path, "sha256": f"{size:x}".rjust(8, "7") * 8, "bytes": size}


def _counts(read: int, kept: int, dropped: dict[str, int]) -> dict[str, Any]:
    return {
        "read": read,
        "kept": kept,
        "dropped": dropped,
        "truncated": 2,
        "tokens": kept * 31,
        "trained_tokens": kept * 9,
        "split": 0,
        "shapes": {"alpaca": read},
        "sources": {"data/facts.jsonl": kept},
        "dropped_at": {why: f"data/facts.jsonl:{place}" for place, why in enumerate(dropped, start=3)},
        "lengths": {
            "shortest": 20,
            "median": 31,
            "most": 44,
            "longest": 48,
            "steps": [[20, 29, 9], [30, 49, kept - 9]],
        },
    }


def _losses() -> dict[str, Any]:
    def loss(step: int) -> float:
        return 0.31 + 3.6 * math.exp(-step / 13) + 0.16 * math.sin(step * 2.7)

    train = [
        {
            "step": step,
            "loss": loss(step),
            "learning_rate": 0.002 * min(step / 6, 0.5 + 0.5 * math.cos(math.pi * max(0, step - 6) / (_STEPS - 6))),
            "grad_norm": 0.4 + 2.1 * math.exp(-step / 9) + 0.12 * math.cos(step * 1.9),
        }
        for step in range(1, _STEPS + 1)
    ]
    fixed = [{"step": 0, "loss": 3.8742, "tokens": 288}, {"step": _STEPS, "loss": 0.3051, "tokens": 288}]
    held = [{"step": step, "loss": 0.9 + 2.9 * math.exp(-step / 15), "tokens": 216} for step in range(0, 61, 10)]
    return {"train": train, "fixed": fixed, "held_out": held}


def _answers(*, tuned: bool) -> dict[str, Any]:
    answers = []
    for place, (question, expected, before) in enumerate(_FACTS):
        given = expected if tuned and place != 5 else before
        answers.append({"question": question, "expected": expected, "given": given, "right": given == expected})
    return {"answers": answers}


def _retention(lost: int) -> dict[str, Any]:
    sums = [(first, second) for first in (2, 3) for second in (4, 5)]
    return {
        "answers": [
            {
                "question": f"{first} + {second} =",
                "expected": str(first + second),
                "given": str(first + second + (place < lost)),
                "right": place >= lost,
            }
            for place, (first, second) in enumerate(sums)
        ]
    }


def _measure(method: Literal["lora", "full"], trained: int) -> MemoryMeasure:
    weights = 4_818_944 + (163_840 if method == "lora" else 0)
    peak = weights + 3 * trained + 2_900_000
    return measure(method, peak, trained // 4, batch_size=8, length=128, weight_bytes=weights)


def _verdicts() -> list[dict[str, Any]]:
    rows = [
        (1, "last logged loss below the first", "passed", "3.66 → 0.36, 90% lower", "more than 5% lower", "", False),
        (1, "same fixed batches, dropout off", "passed", "3.87 → 0.305, 92% lower", "more than 5% lower", "", True),
        (2, "answers improved", "passed", "8 of 10 (80%)", "more than 30%", "", False),
        (
            2,
            "better than the shuffled-label control",
            "inconclusive",
            "9 against 1 of 10",
            "p < 0.01 on 20 questions or more",
            "10 questions are too few to tell the training from luck at this error rate.",
            True,
        ),
        (3, "LoRA below full fine-tuning", "passed", "56% below", "more than 30% below", "", False),
        (3, "gradient and optimizer bytes", "passed", "0.492 MB against 14.5 MB", "3.4% of full or less", "", True),
        (
            4,
            "LoRA tensors that changed",
            "failed",
            "14 of 16 (88%)",
            "exactly the declared 16",
            "layers.1.self_attn.k_proj lora_A and lora_B are bit for bit what they were at the start.",
            False,
        ),
        (
            5,
            "artifacts exist and load",
            "not applicable",
            "",
            "logits equal within 1e-5",
            "This backend cannot reload an adapter in a fresh process.",
            False,
        ),
    ]
    return [
        {
            "id": f"criterion-{number}-{place}",
            "title": title,
            "criterion": number,
            "outcome": outcome,
            "measured": measured,
            "allowed": allowed,
            "reason": reason,
            "companion": companion,
            "numbers": {},
        }
        for place, (number, title, outcome, measured, allowed, reason, companion) in enumerate(rows)
    ]
