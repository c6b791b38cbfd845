"""What a training step minimises: each objective in a file of its own, as a function of its tokens' losses.

An objective is a `ports.Objective`: NumPy in float64, which every backend reads and none knows by name. One that weighs
whole answers, such as a preference between two, splits the losses by `batch.rows`, and gives each token its row's
slope; rows that belong together share a sequence, as packed rows do, so that neither batches nor processes part them.
What it must know of the base, it asks once beforehand with `session.loss(batch, objective)`, where it is handed every
token's loss, too.

To add one: its file here, the choice below, its setting in `config/schema.py`, and, where its rows are others, their
shape in `data/`.
"""

from finetune.config.schema import TrainingSpec
from finetune.objectives.cross_entropy import CrossEntropy
from finetune.ports import Objective


def choose_objective(training: TrainingSpec) -> Objective:
    """The objective of a run, by its settings."""
    return CrossEntropy(training.label_smoothing)
