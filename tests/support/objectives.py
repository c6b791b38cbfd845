"""Objectives to try every backend with."""

from collections import defaultdict

from finetune.objectives.cross_entropy import CROSS_ENTROPY, CrossEntropy
from finetune.objectives.preference import Preference
from finetune.ports import Objective

PREFERENCE = Preference(0.1, defaultdict(float))
"""Each even row is to be likelier than the one after it; the reference knows neither."""
OBJECTIVES: tuple[Objective, ...] = (CROSS_ENTROPY, CrossEntropy(0.3), PREFERENCE)
