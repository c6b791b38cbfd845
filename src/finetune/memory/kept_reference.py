"""Counts what a step keeps for its backward pass with the reference backend, whose numbers all take 8 bytes.

Its backward functions hold what they need until the whole step is over, whatever is frozen: nothing is given back on
the way, and an adapter keeps as much as full fine-tuning. Letters as in `kept`; counts are numbers per token.
"""

from finetune.adapters.kinds import kind_of
from finetune.memory.estimate import BYTES
from finetune.memory.kept import ActivationBytes, mean_rank
from finetune.memory.load import StepLoad
from finetune.records import AdapterTarget, ModelShape

_F64 = BYTES["float64"]
_LINEAR = {
    "q_proj": "hq",
    "k_proj": "hk",
    "v_proj": "hk",
    "o_proj": "qh",
    "gate_proj": "hi",
    "up_proj": "hi",
    "down_proj": "ih",
}
"""The widths that each linear layer reads and writes."""


def kept_by_reference(shape: ModelShape, target: AdapterTarget | None, load: StepLoad) -> ActivationBytes:
    """What one step keeps with the reference backend; `target` is None for full fine-tuning."""
    h, i, table = shape.hidden_size, shape.intermediate_size, shape.heads * load.length
    tables = shape.vocab_size * h * (len(target.rows) if target else 0)
    block = _block(shape, load) + (_adapters(shape, target) if target else 0)
    return ActivationBytes(
        blocks=_F64 * load.tokens * block * shape.layers,
        first_block=_F64 * load.tokens * block,
        # The last norm, RoPE's angles, the states that are asked for words, and tables with trained rows in them.
        outside=_F64 * (load.tokens * (2 * h + 1 + shape.head_dim) + load.targets * h + tables),
        # Logits, logits less their maximum, and probabilities.
        logits=_F64 * 3 * load.targets * shape.vocab_size,
        # On the way back, tables of attention or of the MLP: its product's gradient, slope and both multiplied; beside
        # them the stream's gradient and the two halves of the next one.
        brief=_F64 * load.tokens * (max(3 * table, 3 * i) + 3 * h),
    )


def _block(shape: ModelShape, load: StepLoad) -> int:
    h, i = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * (2 * h + 1)  # each: the normalised input, its output, one factor
    attention = 2 * queries + 2 * keys + shape.heads * load.length  # with the table
    return norms + attention + 5 * i  # gate, its sigmoid, silu(gate), up and their product


def _adapters(shape: ModelShape, target: AdapterTarget) -> int:
    heads = {"q": shape.heads * shape.head_dim, "k": shape.kv_heads * shape.head_dim}
    widths = {"h": shape.hidden_size, "i": shape.intermediate_size, **heads}
    hit = {name: (widths[ends[0]], widths[ends[1]]) for name, ends in _LINEAR.items() if name in target.names}
    masks = 2 * sum(read for read, _ in hit.values()) if target.dropout > 0 else 0
    return masks + sum(
        kind_of(target).kept_by_reference(name, written, read, mean_rank(shape, target, name))
        for name, (read, written) in hit.items()
    )
