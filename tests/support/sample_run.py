"""A run.json as a healthy little run would write it, to render and to break on purpose."""

import math
from typing import Any

_STEPS = 60
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
    """A complete run in which one criterion of each outcome occurs; `changes` replace whole sections."""
    run: dict[str, Any] = {
        "format": 1,
        "id": "20261122-201530-a1b2",
        "status": "complete",
        "started": "2026-11-22T20:15:30+00:00",
        "command": "ft train --model tiny-llama --data facts.jsonl --set training.seed=0 --output runs",
        "outcome": "broken",
        "versions": {"finetune": "0.1.0", "torch": "2.9.0", "transformers": "4.57.1", "peft": "0.18"},
        "machine": {
            "system": "Linux 6.1",
            "python": "3.11.9",
            "processor": "x86_64",
            "cores": 2,
            "memory_bytes": 8_217_000_000,
        },
        "seeds": {"training": 0, "data": 0},
        "plan": [
            {"key": "training.seed", "value": 0, "origin": "flag"},
            {"key": "training.learning_rate", "value": 0.002, "origin": "profile"},
            {"key": "training.batch_size", "value": 8, "origin": "file"},
            {"key": "training.resume_from", "value": None, "origin": "default"},
            {"key": "adapter.modules", "value": ["q_proj", "k_proj", "v_proj", "o_proj"], "origin": "derived"},
            {"key": "data.path", "value": "facts.jsonl", "origin": "environment"},
        ],
        "model": {
            "name": "tiny-llama",
            "source": "shipped",
            "architecture": "LlamaForCausalLM",
            "parameters": 1_204_736,
            "trainable_parameters": 40_960,
            "context_length": 512,
            "files": [_file("model.safetensors", 4_819_216)],
        },
        "data": {
            "files": [_file("data/facts.jsonl", 48_213)],
            "train": _counts(212, 198, {"empty answer": 5, "duplicate of another row": 9}),
            "valid": _counts(24, 24, {}),
            "rehearsal": None,
        },
        "losses": _losses(),
        "scores": {
            "learning": {"base": _answers(tuned=False), "tuned": _answers(tuned=True), "sham": _answers(tuned=False)},
            "retention": {"base": _retention(0), "tuned": _retention(1)},
        },
        "memory": {"lora": _measure("lora", 163_840), "full": _measure("full", 4_818_944)},
        "timing": {"prepare": 0.412, "train": 74.3, "evaluate": 18.26, "report": 0.91, "total": 93.49},
        "throughput": {"tokens_per_second": 5123.4},
        "peak_rss_bytes": 612_000_000,
        "verdicts": _verdicts(),
        "artifacts": [_file("adapter/adapter_model.safetensors", 165_008), _file("report.html", 141_000)],
        "notes": ["9 rows repeat another row word for word and were dropped.", "Dropout is 0."],
    }
    return {**run, **changes}


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


def _measure(method: str, trained: int) -> dict[str, Any]:
    weights = 4_818_944 + (163_840 if method == "lora" else 0)
    return {
        "method": method,
        "batch_size": 8,
        "length": 128,
        "dtype": "float32",
        "steps": 3,
        "framework_rss": 241_000_000,
        "peak_rss": 252_000_000 + 3 * trained,
        "peak_tensors": weights + 3 * trained + 2_900_000,
        "gradient_bytes": trained,
        "optimizer_bytes": 2 * trained,
        "weight_bytes": weights,
    }


def _verdicts() -> list[dict[str, Any]]:
    rows = [
        (1, "last logged loss below the first", "holds", "3.66 → 0.36, 90 % lower", "more than 5 % lower", "", False),
        (1, "same fixed batches, dropout off", "holds", "3.87 → 0.305, 92 % lower", "more than 5 % lower", "", True),
        (2, "answers improved", "holds", "8 of 10 (80 %)", "more than 30 %", "", False),
        (
            2,
            "better than the sham control",
            "undecided",
            "9 against 1 of 10",
            "p < 0.01 on 20 questions or more",
            "10 questions are too few to tell the training from luck at this error rate.",
            True,
        ),
        (3, "LoRA below full fine-tuning", "holds", "56 % below", "more than 30 % below", "", False),
        (3, "gradient and optimizer bytes", "holds", "0.492 MB against 14.5 MB", "3.4 % of full or less", "", True),
        (
            4,
            "LoRA tensors that changed",
            "broken",
            "14 of 16 (88 %)",
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
