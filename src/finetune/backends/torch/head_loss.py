"""The loss from hidden states, a slice of tokens at a time: the logits of a whole batch are never held at once.

A vocabulary of 50,000 makes logits the largest tensors of a step, and the usual cross-entropy holds three of them.
Where the head is frozen, its only gradient is that of the hidden states, and that is known as soon as the loss is.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from finetune.memory.kept import SLICE_BYTES


def head_losses(
    hidden: torch.Tensor,
    head: torch.nn.Linear,
    targets: torch.Tensor,
    smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
    *,
    each: bool = False,
) -> torch.Tensor:
    """The cross-entropy in nats of `head` over hidden (tokens, width) against targets (tokens,), summed.

    Args:
        smoothing: the share of a target that is spread over all words.
        weights: (tokens,) what each token's loss is multiplied with in the sum.
        each: give every token's loss, (tokens,), which has no gradient, instead of the sum.
    """
    if each:
        slices = _slices(hidden, head.weight)
        parts = [_slice_losses(hidden[at], (head.weight, head.bias), targets[at, None], smoothing) for at in slices]
        return torch.cat(parts) if parts else hidden.new_zeros(0)
    loss: torch.Tensor = _HeadLoss.apply(hidden, head.weight, head.bias, targets, smoothing, weights)
    return loss


def table_losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
    *,
    each: bool = False,
) -> torch.Tensor:
    """The same from a whole table of logits (tokens, words), as a head that learns needs it."""
    how = "sum" if weights is None and not each else "none"
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction=how, label_smoothing=smoothing)
    return loss if weights is None else (loss * weights).sum()


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
        weight, bias, targets, smoothing, weights = frozen
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for at in _slices(hidden, weight):
            part = None if gradient is None else gradient[at]
            losses = _slice_losses(hidden[at], (weight, bias), targets[at, None], smoothing, part)
            total += losses.sum() if weights is None else (losses * weights[at]).sum()
        if gradient is not None and weights is not None:
            gradient *= weights[:, None]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None, None


def _slices(hidden: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    """As many tokens at a time as have logits of `SLICE_BYTES`."""
    width = torch.promote_types(hidden.dtype, torch.float32).itemsize
    size = max(1, SLICE_BYTES // (width * len(weight)))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def _slice_losses(
    hidden: torch.Tensor,
    head: tuple[torch.Tensor, Any],
    answers: torch.Tensor,
    smoothing: float,
    gradient: torch.Tensor | None = None,
) -> torch.Tensor:
    """The losses (tokens,) of some tokens against answers (tokens, 1); their gradient is written where one is wanted.

    A function of its own, so that its logits are gone before the next slice makes others.
    """
    weight, bias = head
    scores = torch.nn.functional.linear(hidden, weight, bias)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    highest = scores.amax(-1, keepdim=True)
    right = scores.gather(-1, answers) - highest
    # In place: the one large tensor becomes the probabilities, and then their gradient.
    scores.sub_(highest)
    if smoothing:
        right = (1 - smoothing) * right + smoothing * scores.mean(-1, keepdim=True)
    sums = scores.exp_().sum(-1, keepdim=True)
    if gradient is not None:
        scores.div_(sums).scatter_add_(-1, answers, torch.full_like(sums, smoothing - 1.0))
        if smoothing:
            scores.sub_(smoothing / len(weight))
        torch.mm(scores.to(weight.dtype), weight, out=gradient)
    return (sums.log() - right)[:, 0]
