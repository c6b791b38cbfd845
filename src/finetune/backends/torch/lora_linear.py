"""LoRA's linear layer with the same numbers as PEFT's, in fewer passes over the activations.

PEFT adds a second, thin path to each layer: five thin products and three passes over tensors as large as the layer's
output, which on a CPU take about as long as the layer itself. Here the adapter is folded into the weight for the length
of one product, W + scale B A, and the gradients of A and B are taken in the order in which each product reads memory
along its rows. What PEFT's layer can do besides (several adapters, merging, variants, another dtype) stays PEFT's.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear

from finetune.backends.torch.packed import PackedLinear


class FoldedLinear(Linear):  # type: ignore[misc]
    """PEFT's `Linear` with another forward pass; made from one by `fold_adapters`, never constructed."""

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """The layer's output; of x (..., in) it is (..., out)."""
        # Asked without training, a layer is PEFT's to the last bit, and one token needs no folded weight.
        name = self._only_adapter(x) if torch.is_grad_enabled() else None
        if name is None or args or kwargs:
            output: torch.Tensor = super().forward(x, *args, **kwargs)
            return output
        base, dropout = self.get_base_layer(), self.lora_dropout[name]
        factors = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        if self.training and getattr(dropout, "p", 0.0) > 0:
            added: torch.Tensor = _Added.apply(base(x), dropout(x), *factors)
            return added
        x = _Kept.apply(x)
        folded: torch.Tensor = _Folded.apply(x, x.grad_fn, (base, self.fan_in_fan_out), *factors)
        return folded

    def _only_adapter(self, x: torch.Tensor) -> str | None:
        """The adapter that acts on `x`, if it is the only one and nothing about it is out of the ordinary."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or self.lora_variant:
            return None
        layers, base = (self.lora_A[active[0]], self.lora_B[active[0]]), self.get_base_layer()
        held = base if isinstance(base, PackedLinear) else base.weight
        dtypes = {each.dtype for each in (x, held, *(layer.weight for layer in layers))}
        plain = all(layer.bias is None for layer in layers) and len(dtypes) == 1
        # In half precision the sum W + scale B A would round small changes away.
        return active[0] if plain and x.dtype in (torch.float32, torch.float64) else None


def fold_adapters(model: torch.nn.Module) -> None:
    """Let every adapted linear layer of `model` compute in the short way; a layer of another kind stays as it is."""
    for module in model.modules():
        if type(module) is Linear and not module.get_base_layer().weight.requires_grad:
            module.__class__ = FoldedLinear


class _Kept(torch.autograd.Function):  # type: ignore[misc]
    """x itself, kept for `_Folded` before that computes, as torch's own operations keep what they read.

    A block that is computed again stops where the last tensor is kept: so it is spared its last product.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class _Folded(torch.autograd.Function):  # type: ignore[misc]
    """x (W + scale B A)' + bias, for a frozen W (out, in) and bias (out,); A is (rank, in), B is (out, rank).

    `base` is the layer of W and the bias, and whether it holds W turned.
    `kept` is the node of `_Kept` that has x; there is none where no gradient of x is wanted.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kept: Any, base: tuple[Any, bool], *factors: Any) -> torch.Tensor:
        a, b, ctx.scale = factors
        ctx.kept, ctx.weights = kept, (base, a, b)
        if kept is None:
            ctx.save_for_backward(x)
        return torch.nn.functional.linear(x, _fold(base, a, b, ctx.scale), base[0].bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors if ctx.kept is None else ctx.kept.saved_tensors
        base, a, b = ctx.weights
        # Folded again rather than kept: a copy of every weight would cost more than the small product.
        dx = grad @ _fold(base, a, b, ctx.scale) if ctx.needs_input_grad[0] else None
        da, db, _ = _factor_gradients(x, grad, a, b, ctx.scale)
        return dx, None, None, da, db, None


def _fold(base: tuple[Any, bool], a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale B A (out, in), a tensor of its own."""
    layer, turned = base
    weight = layer.weight.t() if turned else layer.weight
    # What is packed is unpacked into a new tensor, which has room for the sum.
    room = {"out": weight} if isinstance(layer, PackedLinear) else {}
    return torch.addmm(weight, b, a, alpha=scale, **room)


class _Added(torch.autograd.Function):  # type: ignore[misc]
    """output + scale (x A') B': what dropout leaves of x is not what the frozen weight reads, so nothing folds."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, x: torch.Tensor, *factors: Any) -> torch.Tensor:
        a, b, scale = factors
        ctx.save_for_backward(x, a, b)
        ctx.scale = scale
        read = x.flatten(0, -2) @ a.t()
        return torch.addmm(output.flatten(0, -2), read, b.t(), alpha=scale).view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        da, db, through = _factor_gradients(x, grad, a, b, ctx.scale)
        dx = (through.t() @ a).view_as(x) if ctx.needs_input_grad[1] else None
        return grad, dx, da, db, None


def _factor_gradients(
    x: torch.Tensor, grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of A and B, and scale B' grad' (rank, tokens), from which that of the input follows."""
    rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
    through = (b.t().contiguous() * scale) @ grads.t()
    read = (a * scale) @ rows.t()
    return through @ rows, (read @ grads).t().contiguous(), through
