"""Measures the memory of a few training steps with torch; started as a program (see `finetune.backends.probe`)."""

import itertools

import torch

from finetune.backends.probe import Probe, one_step, run_probe
from finetune.backends.torch.backend import TorchBackend
from finetune.backends.torch.session import TorchSession
from finetune.backends.torch.state import quiet_wrapping
from finetune.records import Batch


def warm_up() -> None:
    """Let torch, transformers and PEFT load what any training loads."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with quiet_wrapping():
        model = peft.get_peft_model(LlamaForCausalLM(tiny), peft.LoraConfig(r=1, target_modules=["q_proj"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    model(input_ids=torch.zeros((2, 8), dtype=torch.long)).logits.sum().backward()
    optimizer.step()


def peak_tensors(session: TorchSession, batch: Batch, accumulation: int = 1) -> int:
    """What lives before a step (weights, moments) plus the highest sum of allocations within it, in bytes.

    Torch's own profiler tells every allocation and release.

    Args:
        session: has made a step already, so that its moments exist.
        accumulation: how often the batch is added up in the step.
    """
    before = weight_bytes(session) + moment_bytes(session)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        one_step(session, batch, accumulation)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return before + max(itertools.accumulate(int(event.nbytes()) for event in events), default=0)


def gradient_bytes(session: TorchSession) -> int:
    """The bytes of all gradients."""
    return sum(int(tensor.grad.nbytes) for tensor in session.model.parameters() if tensor.grad is not None)


def moment_bytes(session: TorchSession) -> int:
    """The bytes of the optimizer's averages."""
    moments = [value for state in session.optimizer.state.values() for key, value in state.items() if key != "step"]
    return sum(int(value.nbytes) for value in moments)


def weight_bytes(session: TorchSession) -> int:
    """The bytes of all weights, an adapter's included."""
    return sum(int(tensor.nbytes) for tensor in session.model.parameters())


if __name__ == "__main__":
    run_probe(TorchBackend, Probe(warm_up, peak_tensors, gradient_bytes, moment_bytes, weight_bytes, device="cpu"))
