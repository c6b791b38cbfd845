"""Measures the memory of a few training steps in this process, then prints it. Started by `finetune.evidence.memory`.

Asked for the method "framework", it stops before any model is loaded. Of training it tells three
figures, none of them derived from another: the peak resident set above what the frameworks alone take, the peak of
live tensor bytes (every allocation and release, told by torch's own profiler), and the exact bytes of gradients and
moments.
"""

import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

from finetune.backends.torch.backend import TorchBackend
from finetune.backends.torch.session import TorchSession
from finetune.processes import peak_rss, restart_peak
from finetune.records import AdapterTarget, Batch, ModelLocation, Optimization, TokenizedRow

_STEPS = 3


def main() -> None:
    """Read one request from standard input, measure, print one JSON object."""
    request = json.load(sys.stdin)
    _warm_up()
    framework = psutil.Process().memory_info().rss
    if request["method"] == "framework":
        print(json.dumps({"framework_rss": framework}))
        return
    restart_peak()
    session = _open(request)
    batch = _random_batch(request)
    for _ in range(_STEPS):
        gradient_bytes = _step(session, batch)
    peak = peak_rss()
    print(
        json.dumps(
            {
                "method": request["method"],
                "batch_size": request["batch_size"],
                "length": request["length"],
                "dtype": request["dtype"],
                "steps": _STEPS,
                "framework_rss": framework,
                "peak_rss": peak,
                "peak_tensors": peak_tensors(session, batch),
                "gradient_bytes": gradient_bytes,
                "optimizer_bytes": _moment_bytes(session),
                "weight_bytes": sum(tensor.nbytes for tensor in session.model.parameters()),
            }
        )
    )


def _warm_up() -> None:
    """Let torch, transformers and PEFT load what any training loads, so that it counts as framework."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = peft.get_peft_model(LlamaForCausalLM(tiny), peft.LoraConfig(r=1, target_modules=["q_proj"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    model(input_ids=torch.zeros((2, 8), dtype=torch.long)).logits.sum().backward()
    optimizer.step()


def _open(request: dict[str, Any]) -> TorchSession:
    location = ModelLocation(request["name"], Path(request["folder"]), request["source"])
    session = TorchBackend().open(location, request["dtype"], pad_id=0, device="cpu")
    session.attach(AdapterTarget(**request["target"]) if request["method"] == "lora" else None, seed=0)
    session.prepare_updates(Optimization(weight_decay=0.0, max_grad_norm=1.0))
    return session


def _random_batch(request: dict[str, Any]) -> Batch:
    rng = random.Random(0)
    size = request["length"]
    rows = [[rng.randrange(request["vocab_size"]) for _ in range(size)] for _ in range(request["batch_size"])]
    return Batch(tuple(TokenizedRow(tuple(ids), (True,) * size, "probe") for ids in rows))


def _step(session: TorchSession, batch: Batch) -> int:
    """One step; returns the bytes of all gradients just before they are cleared."""
    session.accumulate(batch, 1 / batch.target_count)
    gradient_bytes = sum(int(tensor.grad.nbytes) for tensor in session.model.parameters() if tensor.grad is not None)
    session.clip_gradients()
    session.update(1e-4)
    return gradient_bytes


def peak_tensors(session: TorchSession, batch: Batch, accumulation: int = 1) -> int:
    """What lives before a step (weights, moments) plus the highest sum of allocations within it, in bytes.

    Args:
        session: has made a step already, so that its moments exist.
        accumulation: how often the batch is added up in the step.
    """
    before = sum(int(tensor.nbytes) for tensor in session.model.parameters()) + _moment_bytes(session)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in range(accumulation - 1):
            session.accumulate(batch, 1 / batch.target_count)
        _step(session, batch)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return before + max(itertools.accumulate(int(event.nbytes()) for event in events), default=0)


def _moment_bytes(session: TorchSession) -> int:
    moments = [value for state in session.optimizer.state.values() for key, value in state.items() if key != "step"]
    return sum(int(value.nbytes) for value in moments)


if __name__ == "__main__":
    main()
