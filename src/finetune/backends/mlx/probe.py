"""Measures the memory of a few training steps in this process, then prints it. Started by `finetune.evidence.memory`.

Asked for the method "framework", it stops before any model is loaded. Of training it tells three
figures, none of them derived from another: the peak resident set above what the frameworks alone take, the peak of
live bytes that MLX's own allocator saw within a step, and the exact bytes of gradients and moments.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil
from mlx import nn
from mlx.utils import tree_flatten

from finetune.backends.mlx.backend import MlxBackend
from finetune.backends.mlx.session import MlxSession
from finetune.processes import peak_rss, restart_peak
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization, TokenizedRow

_STEPS = 3


def main() -> None:
    """Read one request from standard input, measure, print one JSON object."""
    request = json.load(sys.stdin)
    _warm_up()
    framework = psutil.Process().memory_info().rss
    if request["method"] == "framework":
        json.dump({"framework_rss": framework}, sys.stdout)
        return
    restart_peak()
    session = _open(request)
    batch = _random_batch(request)
    for _ in range(_STEPS):
        gradient_bytes = _step(session, batch)
    answer = {
        "method": request["method"],
        "batch_size": request["batch_size"],
        "length": request["length"],
        "dtype": request["dtype"],
        "steps": _STEPS,
        "framework_rss": framework,
        "peak_rss": peak_rss(),
        "peak_tensors": peak_tensors(session, batch),
        "gradient_bytes": gradient_bytes,
        "optimizer_bytes": moment_bytes(session),
        "weight_bytes": weight_bytes(session),
    }
    json.dump(answer, sys.stdout)


def _warm_up() -> None:
    """Let MLX load what any training loads, so that it counts as framework."""
    layer = nn.Linear(16, 16)
    loss, _ = nn.value_and_grad(layer, lambda x: nn.losses.cross_entropy(layer(x), mx.zeros(8, mx.int32)).sum())(
        mx.zeros((8, 16))
    )
    mx.eval(loss)


def _open(request: dict[str, Any]) -> MlxSession:
    location = ModelLocation(request["name"], Path(request["folder"]), request["source"])
    session = MlxBackend().open(location, request["dtype"], pad_id=0)
    session.attach(AdapterTarget(**request["target"]) if request["method"] == "lora" else None, seed=0)
    session.prepare_updates(Optimization(weight_decay=0.0, max_grad_norm=1.0))
    return session


def _random_batch(request: dict[str, Any]) -> Batch:
    rng = random.Random(0)
    size = request["length"]
    rows = [[rng.randrange(request["vocab_size"]) for _ in range(size)] for _ in range(request["batch_size"])]
    return Batch(tuple(TokenizedRow(tuple(ids), (True,) * size, "probe") for ids in rows))


def _step(session: MlxSession, batch: Batch) -> int:
    """One step; returns the bytes of all gradients just before they are cleared."""
    session.accumulate(batch, 1 / batch.target_count)
    gradient_bytes = sum(int(tensor.nbytes) for tensor in session.gradients.values())
    session.clip_gradients()
    session.update(1e-4)
    return gradient_bytes


def peak_tensors(session: MlxSession, batch: Batch) -> int:
    """The most bytes that were alive at once within a step, weights and moments included."""
    mx.reset_peak_memory()
    _step(session, batch)
    return int(mx.get_peak_memory())


def weight_bytes(session: MlxSession) -> int:
    """The bytes of all weights, an adapter's included."""
    return sum(int(tensor.nbytes) for _, tensor in tree_flatten(session.loaded.model.parameters()))


def moment_bytes(session: MlxSession) -> int:
    """The bytes of the optimizer's averages."""
    optimizer = session.optimizer
    return sum(int(tensor.nbytes) for moments in (optimizer.first, optimizer.second) for tensor in moments.values())


if __name__ == "__main__":
    main()
