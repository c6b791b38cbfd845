"""Measures the memory of a few training steps with MLX; started as a program (see `finetune.backends.probe`)."""

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from finetune.backends.mlx.backend import MlxBackend
from finetune.backends.mlx.session import MlxSession
from finetune.backends.probe import Probe, one_step, run_probe
from finetune.records import Batch


def warm_up() -> None:
    """Let MLX load what any training loads."""
    layer = nn.Linear(16, 16)
    loss, _ = nn.value_and_grad(layer, lambda x: nn.losses.cross_entropy(layer(x), mx.zeros(8, mx.int32)).sum())(
        mx.zeros((8, 16))
    )
    mx.eval(loss)


def peak_tensors(session: MlxSession, batch: Batch) -> int:
    """The most bytes that MLX's own allocator saw alive at once within a step, weights and moments included."""
    mx.reset_peak_memory()
    one_step(session, batch)
    return int(mx.get_peak_memory())


def gradient_bytes(session: MlxSession) -> int:
    """The bytes of all gradients."""
    return sum(int(tensor.nbytes) for tensor in session.gradients.values())


def moment_bytes(session: MlxSession) -> int:
    """The bytes of the optimizer's averages."""
    optimizer = session.optimizer
    return sum(int(tensor.nbytes) for moments in (optimizer.first, optimizer.second) for tensor in moments.values())


def weight_bytes(session: MlxSession) -> int:
    """The bytes of all weights, an adapter's included."""
    return sum(int(tensor.nbytes) for _, tensor in tree_flatten(session.loaded.model.parameters()))


if __name__ == "__main__":
    run_probe(MlxBackend, Probe(warm_up, peak_tensors, gradient_bytes, moment_bytes, weight_bytes))
