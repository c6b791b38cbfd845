"""Quantised weights: linear layers whose matrices bitsandbytes has packed, and the full weights that they stand for.

transformers loads them, quantising each matrix as it is read; then the layers become ours. One multiplies with its full
matrix, which it makes for the length of one product, forward and backward: so it computes what a layer with that matrix
computes, to the bit. bitsandbytes' own layers round activations, too, with int8.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from finetune.backends.torch import without
from finetune.errors import ModelError
from finetune.models.quantize import quantize_shape
from finetune.models.shape import read_shape
from finetune.records import ModelShape, Quantization


class PackedLinear(torch.nn.Linear):  # type: ignore[misc]
    """A frozen linear layer whose matrix (outputs, inputs) is packed: `packed` and `scales` are all of it."""

    def __init__(self, layer: Any, dtype: torch.dtype, how: Quantization) -> None:
        """Take over what one of bitsandbytes' layers holds."""
        # Not that of Linear, which would make a matrix.
        torch.nn.Module.__init__(self)
        held, whole = layer.weight, how.scheme == "int8"
        self.in_features, self.out_features, self.dtype, self.how = layer.in_features, layer.out_features, dtype, how
        self.turned = layer.source_cls is Conv1D
        self.packed = torch.nn.Parameter(held.data, requires_grad=False)
        self.scales = torch.nn.Parameter(held.SCB if whole else held.quant_state.absmax, requires_grad=False)
        self.bias = layer.bias

    @property
    def weight(self) -> torch.Tensor:
        """The matrix that the packed one stands for, made anew whenever it is asked for."""
        # In float64, too, it is the one of `dtype`.
        with torch.no_grad(), _disable_current_modes():
            if self.how.scheme == "int8":
                rows = self.packed.float().mul_(self.scales[:, None]).mul_(1 / 127)
                return rows.to(self.dtype)
            from bitsandbytes.functional import QuantState, dequantize_4bit

            size = torch.Size((self.out_features, self.in_features))
            state = QuantState(self.scales, size, None, self.how.group_size, self.how.scheme, self.dtype)
            full: torch.Tensor = dequantize_4bit(self.packed, state)
            return full

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output; of x (..., in) it is (..., out)."""
        output: torch.Tensor = _Product.apply(x, self)
        return output


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """x W' + bias, W made again for the gradient of x rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        ctx.layer = layer
        return torch.nn.functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.layer.weight, None


class _Turned(torch.nn.Linear):  # type: ignore[misc]
    """A layer that the model's files hold inputs x outputs."""


def quantizing(folder: Path, how: Quantization, dtype: torch.dtype, owner: str) -> BitsAndBytesConfig:
    """The settings by which transformers quantises exactly the matrices that `quantize_shape` has quantised.

    Raises:
        ModelError: as `quantize_shape`.
    """
    with without("kernels"):  # by way of which it would fetch code from the hub and run it
        import bitsandbytes  # noqa: F401
    paths = "|".join(map(re.escape, _planned(folder, how, owner).quantized))
    # A pattern of what is left out: all but these, whether or not the model puts a name before those of its files.
    others = rf"(?!(?:.*\.)?(?:{paths})$).*"
    if how.scheme == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[others])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=how.scheme,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[others],
    )


def _planned(folder: Path, how: Quantization, owner: str) -> ModelShape:
    return quantize_shape(read_shape(folder), how, owner)


def take_over(model: Any, folder: Path, how: Quantization, owner: str) -> None:
    """Make bitsandbytes' layers ours, and the model one that no longer calls itself quantised.

    Raises:
        ModelError: other matrices are packed than are to be.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    layers = {path: each for path, each in model.named_modules() if isinstance(each, (Linear4bit, Linear8bitLt))}
    wanted = _planned(folder, how, owner).quantized
    if len(layers) != len(wanted):
        raise ModelError(
            f"{owner}: {len(wanted)} matrices are to be quantised, but transformers holds {len(layers)} of them as "
            "layers that bitsandbytes can quantise",
            hint="leave out model.quantize",
        )
    for path, layer in layers.items():
        model.set_submodule(path, PackedLinear(layer, model.dtype, how))
    # What is left is mapped from the files, and would keep all that was read of them in memory.
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()
    model.hf_quantizer.remove_quantization_config(model)
    for said in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(said, None)


def turned(model: Any) -> bool:
    """Whether a model's files hold its layers inputs x outputs."""
    return any(isinstance(each, Conv1D) or getattr(each, "turned", False) for each in model.modules())


def is_packed(model: Any) -> bool:
    """Whether a layer of the model is packed."""
    return any(isinstance(each, PackedLinear) for each in model.modules())


def unpack(model: Any) -> None:
    """Put the full weights that they stand for in the place of all packed ones, outputs x inputs."""
    for path, layer in [*model.named_modules()]:
        if isinstance(layer, PackedLinear):
            with torch.device("meta"):
                full = (_Turned if layer.turned else torch.nn.Linear)(layer.in_features, layer.out_features, bias=False)
            full.weight, full.bias = torch.nn.Parameter(layer.weight), layer.bias
            model.set_submodule(path, full)


def turn_back(model: Any) -> None:
    """Make layers that were unpacked into those that the model's files are for."""
    for path, layer in [*model.named_modules()]:
        if isinstance(layer, _Turned):
            with torch.device("meta"):
                own = Conv1D(layer.out_features, layer.in_features)
            own.weight, own.bias = torch.nn.Parameter(layer.weight.detach().t().contiguous()), layer.bias
            model.set_submodule(path, own)
