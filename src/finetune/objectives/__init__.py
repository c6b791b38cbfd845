"""What a training step minimises: each objective in a file of its own, as a function of its tokens' losses.

An objective is a `ports.Objective`: NumPy in float64, which every backend reads and none knows by name. One that weighs
whole answers, such as a preference between two, splits the losses by `batch.rows`, and gives each token its row's
slope; rows that belong together share a sequence, as packed rows do, so that neither batches nor processes part them.
What it must know of the base, it asks once beforehand with `session.loss(batch, objective)`, where it is handed every
token's loss, too.

To add one: its file here, the choice below, its setting in `config/schema.py`, and, where its rows are others, their
shape in `data/`.
"""

from collections.abc import Iterable
from dataclasses import replace

from finetune.config.schema import TrainingSpec
from finetune.objectives.cross_entropy import CROSS_ENTROPY, CrossEntropy
from finetune.objectives.preference import Preference, reference_of
from finetune.ports import Objective, Session
from finetune.records import TokenizedRow


def choose_objective(training: TrainingSpec, session: Session, rows: Iterable[TokenizedRow]) -> Objective:
    """The objective of a run, by its settings.

    Args:
        session: as it stands at step 0: what preferences are measured from.
        rows: all rows whose loss is asked for.
    """
    if training.objective == "dpo":
        return Preference(training.dpo_beta, reference_of(session, rows), training.label_smoothing)
    return CrossEntropy(training.label_smoothing)


def measured_in(objective: Objective) -> Objective:
    """What losses are told in that training is judged and stopped by: the same without smoothing."""
    return replace(objective, flipped=0.0) if isinstance(objective, Preference) else CROSS_ENTROPY
