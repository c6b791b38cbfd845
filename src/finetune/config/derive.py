"""The learning rate and the epochs of a run that names none: from the model's size, what is trained, and the rows.

Sources. LoRA: 2e-4 at 7 to 13 B parameters and 1e-4 at 33 to 65 B (Dettmers et al. 2023, QLoRA, appendix B.2); it falls
with the model's width, hardly moves with the rank, and is some ten times that of full fine-tuning (Schulman et al.
2025, LoRA Without Regret). IA3: 3e-3 at 3 B (Liu et al. 2022). Epochs: three, fewer where more than 25,000 rows would
be seen (OpenAI's cookbook). Measured here: 1e-3 taught SmolLM2-135M its rows, and 5e-3 for twelve epochs made it
forget; in 45 steps a shipped model learned more at 5e-3 than at 2e-3 (IA3: at 5e-2 than at 5e-3), and a full model as
much at 5e-4.
"""

import math

from finetune.adapters.kinds import ADAPTER_KINDS

_ANCHOR, _RATE, _POWER = 135e6, 1e-3, 0.4
"""At so many parameters LoRA learns at this rate; it falls with this power of them, through the published rates."""
_SLOWEST, _FASTEST = 5e-5, 5e-3
_FULL = 0.1
_DPO = 0.1
"""Preferences are learned more slowly: Zephyr's LoRA of 7 B took 2e-4 for its answers and 5e-6 for its pairs. A
tenth is our choice; it was tried in one run of a shipped model."""
FEWEST_STEPS = 30
"""From fewer optimizer steps than this, little can be learned at any rate."""
_EPOCHS, MOST_EPOCHS, _MOST_ROWS_SEEN = 3, 10, 25_000


def derived_learning_rate(parameters: int, kind: str, objective: str = "sft") -> float:
    """The learning rate for a model of so many parameters, two digits of it; `kind` is an adapter's, or full."""
    factor = ADAPTER_KINDS[kind].learning_rate_factor if kind in ADAPTER_KINDS else _FULL
    rate = min(_FASTEST, max(_SLOWEST, _RATE * (_ANCHOR / parameters) ** _POWER))
    factor *= _DPO if objective == "dpo" else 1.0
    # Two digits: a plan that can be read, and the same on every machine.
    return float(f"{factor * rate:.1e}")


def derived_epochs(rows: int, steps_per_epoch: int) -> float:
    """How many times the rows are gone through: more often where they make few steps, once where they are many."""
    wanted = max(_EPOCHS, math.ceil(FEWEST_STEPS / steps_per_epoch))
    return float(max(1, min(wanted, MOST_EPOCHS, _MOST_ROWS_SEEN // rows)))
