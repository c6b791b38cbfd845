"""Makes `st.from_type(TrainingConfig)` and the like work for everybody who has installed this package.

Hypothesis calls `register` when it is imported (entry point `hypothesis`). Nothing of ours is imported then: only when
a type of ours is asked for is the strategy for it looked up.
"""

from importlib import import_module
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies._internal import types

_SECTIONS = {
    "ModelSpec": "model",
    "DataSpec": "data",
    "TemplateSpec": "template",
    "TokenSpec": "tokens",
    "AdapterSpec": "adapter",
    "TrainingSpec": "training",
    "EvaluationSpec": "evaluation",
    "JudgeSpec": "judge",
    "TrackingSpec": "tracking",
}
STRATEGIES: dict[tuple[str, str], tuple[str, ...]] = {
    ("finetune.config.schema", "TrainingConfig"): ("configs", "configs"),
    **{("finetune.config.schema", name): ("configs", "specs", section) for name, section in _SECTIONS.items()},
    ("finetune.records", "Conversation"): ("conversations", "conversations"),
    ("finetune.records", "TokenizedRow"): ("datasets", "any_tokenized"),
    ("finetune.records", "Batch"): ("datasets", "any_batches"),
    ("finetune.records", "ModelShape"): ("models", "model_shapes"),
    ("finetune.records", "AdapterTarget"): ("adapters", "any_adapter_targets"),
}
"""Each type by its module and name, with its strategy: module here, name, and what it takes."""


def register() -> None:
    """Tell Hypothesis of the strategies for our types; it asks once the package `finetune` has been imported."""
    lookup = getattr(types, "_global_extra_lookup", None)
    if lookup is not None:
        lookup["finetune"] = strategy_for
        return
    # Hypothesis has lost its way to ask late; slower to import, its public way still works.
    for module, name in STRATEGIES:
        st.register_type_strategy(getattr(import_module(module), name), _required_strategy)


def strategy_for(kind: Any) -> st.SearchStrategy[Any] | None:
    """The strategy for one of our types, None for any other."""
    home = STRATEGIES.get((getattr(kind, "__module__", ""), getattr(kind, "__qualname__", "")))
    return None if home is None else _made(*home)


def _required_strategy(kind: type[Any]) -> st.SearchStrategy[Any]:
    return _made(*STRATEGIES[kind.__module__, kind.__qualname__])


def _made(module: str, name: str, *given: str) -> st.SearchStrategy[Any]:
    found: st.SearchStrategy[Any] = getattr(import_module(f"finetune_strategies.{module}"), name)(*given)
    return found
