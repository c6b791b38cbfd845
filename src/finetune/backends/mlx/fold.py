"""The product of an adapted layer, with its adapter folded into the weight for the length of one product.

MLX works through elementwise operations one number after another on a processor, so each pass over a tensor as large as
a layer's output counts: adding a thin second path takes several, forth and back. Here there is none.
"""

import mlx.core as mx


def through_folded(x: mx.array, weight: mx.array, down: mx.array, up: mx.array) -> mx.array:
    """The product x (W + B A)' of x (..., inputs), frozen W (outputs, inputs), A (rank, inputs), B (outputs, rank)."""
    product: mx.array = _product(x, mx.stop_gradient(weight), down, up)
    return product


@mx.custom_function  # type: ignore[untyped-decorator]
def _product(x: mx.array, weight: mx.array, down: mx.array, up: mx.array) -> mx.array:
    return x @ (weight + up @ down).T


@_product.vjp  # type: ignore[untyped-decorator]
def _slopes(primals: list[mx.array], slope: mx.array, output: mx.array) -> tuple[mx.array, ...]:
    del output
    x, weight, down, up = primals
    seen, wanted = x.reshape(-1, x.shape[-1]), slope.reshape(-1, slope.shape[-1])
    # Folded again rather than kept: a copy of every weight would cost more than the small product.
    return slope @ (weight + up @ down), mx.zeros_like(weight), (wanted @ up).T @ seen, wanted.T @ (seen @ down.T)
