"""What laws of trained things share: settings with which little is enough to move far, runs, and altered copies."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import Field

from finetune.adapters.kinds import ADAPTER_KINDS
from finetune.records import DEFAULT_KIND
from finetune_strategies.cases.rows import PLAIN, TINY, Pair, Rows, one_of
from finetune_strategies.recipes import ModelRecipe

Array = NDArray[Any]
R = TypeVar("R")
WIDE = ModelRecipe(layers=2, hidden=18, heads=6, kv_heads=3, head_size=4, intermediate=7, seed=5)
"""Two layers; six heads share three of keys and values, and together are wider than the model."""

QUICK: Mapping[str, Any] = {
    **PLAIN,
    "training.learning_rate": 0.05,
    "training.schedule": "constant",
    "training.warmup_fraction": 0.0,
    "training.batch_size": 1,
    "training.epochs": 2.0,
    "training.save_every": 1_000,
    "training.max_grad_norm": 1e6,
}
"""Two steps a row, so fast that whatever is done with what was learned can be seen; some refuse less than a batch."""

PROMPT = [40, 50, 60, 70, 80]

KINDS: Mapping[str, Mapping[str, Any]] = {
    **{name: {"adapter.kind": name} for name in ADAPTER_KINDS},
    "rank-stabilised": {"adapter.scaling": "rank_stabilized"},
    "with a head of its own": {"adapter.modules_to_save": ["lm_head"]},
    "of two layers": {"adapter.target_modules": ["k_proj", "down_proj"]},
}
"""Every kind of adapter there is, and varieties; each with what is to be set for it."""


def kind_settings(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings and those of a kind of adapter, but for what that kind has no use for."""
    wanted = {**given, **KINDS[kind]}
    own = ADAPTER_KINDS[wanted.get("adapter.kind", DEFAULT_KIND)]
    return {key: value for key, value in wanted.items() if not key.startswith("adapter.") or own.takes(key)}


class Learned(Rows):
    """Rows to learn, by a model and a kind of adapter."""

    model: ModelRecipe = TINY
    kind: Annotated[str, Field(pattern=one_of(KINDS))] = DEFAULT_KIND

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the kind, and quick ones."""
        return kind_settings(self.kind, QUICK)


MODELS = st.sampled_from([TINY, WIDE])
ONE_ROW = st.just((Pair(prompt="ab", completion="cde"),))
"""For laws whose cases are to be all that there are: rows that are drawn make them too many."""


def learned(*kinds: str) -> st.SearchStrategy[Learned]:
    """A row, a model, and one of these kinds; any where none is named."""
    return st.builds(Learned, rows=ONE_ROW, model=MODELS, kind=st.sampled_from(kinds or tuple(KINDS)))
