"""Makes sure that a model keeps rows apart that share a sequence, before it is trained that way."""

from finetune.errors import TrainingError
from finetune.ports import Session
from finetune.records import Batch

_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far the summed loss may differ, relatively, by rounding alone."""


def check_packing(session: Session, packed: Batch | None, dtype: str) -> None:
    """Compare the loss of rows that share a sequence with that of the same rows, each on its own.

    Raises:
        TrainingError: they differ: in this model a row sees its neighbours, so packing would train on their text.
    """
    if packed is None:
        return
    together, apart = session.loss(packed), session.loss(Batch(packed.rows))
    if not abs(together - apart) <= _TOLERANCE[dtype] * abs(apart):
        raise TrainingError(
            f"this model does not keep rows apart that share a sequence: their loss is {together:.6g} nats together "
            f"and {apart:.6g} apart",
            hint="set training.packing to false",
        )
