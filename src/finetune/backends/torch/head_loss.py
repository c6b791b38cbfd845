"""The loss from hidden states, a slice of tokens at a time: the logits of a whole batch are never held at once.

A vocabulary of 50,000 makes logits the largest tensors of a step, and the usual cross-entropy holds three of them.
Where the head is frozen, its only gradient is that of the hidden states, and that is known as soon as the loss is.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from finetune.memory.kept import SLICE_BYTES


def summed_loss(hidden: torch.Tensor, head: torch.nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """The cross-entropy in nats, summed, of `head` over hidden (tokens, width) against targets (tokens,)."""
    loss: torch.Tensor = _HeadLoss.apply(hidden, head.weight, head.bias, targets)
    return loss


def find_head(model: Any) -> torch.nn.Linear | None:
    """The output layer, if the model's logits are what it says and nothing else; None otherwise.

    Some models cap or scale their logits afterwards: what a model does is seen on a few tokens, not read off its name.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return None
    said: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, inputs, output: said.append(output))
    try:
        ids = torch.arange(3, device=head.weight.device)[None]
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    return head if len(said) == 1 and torch.equal(said[0], logits) else None


def is_frozen(head: torch.nn.Linear, model: Any) -> bool:
    """Whether nothing is to be learned about `head`: it is still the model's own, and no gradient of it is wanted."""
    trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in head.parameters())
    return model.get_output_embeddings() is head and not trained


@contextlib.contextmanager
def without_head(head: torch.nn.Linear) -> Iterator[None]:
    """Within this context the model's logits are the hidden states that `head` would read."""
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward


class _HeadLoss(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, *frozen: Any) -> torch.Tensor:
        weight, bias, targets = frozen
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = max(1, SLICE_BYTES // (total.element_size() * len(weight)))
        for start in range(0, len(hidden), size):
            here = slice(start, start + size)
            part = None if gradient is None else gradient[here]
            total += _slice_loss(hidden[here], (weight, bias), targets[here, None], part)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None


def _slice_loss(
    hidden: torch.Tensor, head: tuple[torch.Tensor, Any], answers: torch.Tensor, gradient: torch.Tensor | None
) -> torch.Tensor:
    """The summed loss of some tokens against answers (tokens, 1); their gradient is written where one is wanted.

    A function of its own, so that its logits are gone before the next slice makes others.
    """
    weight, bias = head
    scores = torch.nn.functional.linear(hidden, weight, bias)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    highest = scores.amax(-1, keepdim=True)
    right = scores.gather(-1, answers) - highest
    # In place: the one large tensor becomes the probabilities, and then their gradient.
    sums = scores.sub_(highest).exp_().sum(-1, keepdim=True)
    if gradient is not None:
        scores.div_(sums).scatter_add_(-1, answers, torch.full_like(sums, -1.0))
        torch.mm(scores.to(weight.dtype), weight, out=gradient)
    return (sums.log() - right).sum()
