"""Measures the memory of a few training steps in this process: what the probe of every backend does alike.

Each backend's probe is a program of its own, started by `finetune.evidence.memory`. Asked for the method "framework",
it stops before any model is loaded. Of training it tells three figures, none of them derived from another: the peak
resident set above what the frameworks alone take, the peak of live bytes within a step as the framework itself counts
them, and the exact bytes of gradients and moments.
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.ports import Backend
from finetune.processes import peak_rss, resident_memory, restart_peak
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization, Quantization, TokenizedRow

_STEPS = 3


@dataclass(frozen=True, slots=True)
class Probe:
    """What differs from backend to backend; each function but `warm_up` is given a session.

    `warm_up` lets the framework load what any training loads, so that it counts as framework. `peak_tensors` makes one
    more step over a batch; `gradient_bytes` is asked just before gradients are cleared.
    """

    warm_up: Callable[[], None]
    peak_tensors: Callable[[Any, Batch], int]
    gradient_bytes: Callable[[Any], int]
    optimizer_bytes: Callable[[Any], int]
    weight_bytes: Callable[[Any], int]
    device: str = "auto"


def run_probe(open_backend: Callable[[], Backend], probe: Probe) -> None:
    """Read one request from standard input, measure, print one JSON object."""
    request = json.load(sys.stdin)
    probe.warm_up()
    framework = resident_memory()
    if request["method"] == "framework":
        json.dump({"framework_rss": framework}, sys.stdout)
        return
    restart_peak()
    location = ModelLocation(request["name"], Path(request["folder"]), request["source"])
    how = Quantization(**request["quantize"]) if request.get("quantize") else None
    session = open_backend().open(location, request["dtype"], pad_id=0, quantize=how, device=probe.device)
    session.attach(None if request["method"] == "full" else AdapterTarget(**request["target"]), seed=0)
    again = request.get("gradient_checkpointing", False)
    session.prepare_updates(Optimization(weight_decay=0.0, max_grad_norm=1.0, gradient_checkpointing=again))
    rng = random.Random(0)
    size = request["length"]
    rows = [[rng.randrange(request["vocab_size"]) for _ in range(size)] for _ in range(request["batch_size"])]
    batch = Batch(tuple(TokenizedRow(tuple(ids), (True,) * size, "probe") for ids in rows))
    gradient_bytes = 0
    for _ in range(_STEPS):
        session.accumulate(batch, 1 / batch.target_count)
        gradient_bytes = probe.gradient_bytes(session)
        session.clip_gradients()
        session.update(1e-4)
    answer = {
        **{key: request[key] for key in ("method", "batch_size", "length", "dtype")},
        "steps": _STEPS,
        "framework_rss": framework,
        "peak_rss": peak_rss(),
        "peak_tensors": probe.peak_tensors(session, batch),
        "gradient_bytes": gradient_bytes,
        "optimizer_bytes": probe.optimizer_bytes(session),
        "weight_bytes": probe.weight_bytes(session),
    }
    json.dump(answer, sys.stdout)


def one_step(session: Any, batch: Batch, accumulation: int = 1) -> None:
    """A training step in which the batch is added up so many times."""
    for _ in range(accumulation):
        session.accumulate(batch, 1 / batch.target_count)
    session.clip_gradients()
    session.update(1e-4)
