"""Makes sure that a model keeps rows apart that share a sequence, before it is trained that way."""

import math

from finetune.errors import TrainingError
from finetune.evidence.rounding import factor_of, measure_rounding
from finetune.ports import Session
from finetune.records import Batch


def check_packing(session: Session, packed: Batch, dtype: str) -> float:
    """Compare the loss of rows that share a sequence with that of the same rows, each on its own.

    They may differ by what rounding does to this very model: each target's loss by so much, this way or that, so that
    their sum differs by the square root of their number times as much.

    Returns:
        What this can see: the smallest change of the loss, as a share of it, that is refused.

    Raises:
        TrainingError: they differ: in this model a row sees its neighbours, so packing would train on their text.
    """
    together, apart = session.loss(packed), session.loss(Batch(packed.rows))
    factor, floor = factor_of(dtype), measure_rounding(session, [row.ids for row in packed.rows]).nats
    allowed = factor * floor * math.sqrt(packed.target_count)
    # `not <=` catches NaN.
    if not abs(together - apart) <= allowed:
        raise TrainingError(
            f"this model does not keep rows apart that share a sequence: their loss is {together:.6g} nats together "
            f"and {apart:.6g} apart; {factor:g} times its own rounding allows {allowed:.2g}",
            hint="set training.packing to false",
        )
    return allowed / abs(apart) if apart else math.inf
