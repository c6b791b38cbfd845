"""Faults of reading a model: its config.json says something, and the model is made without it."""

from collections.abc import Callable, Mapping

from finetune.backends.reference import architecture
from finetune.verify.faults.fault import fault, plant

_ROPE = ("rope_parameters", "rope_scaling")


@fault(
    "A223d",
    "model.rope_by_older_name",
    real="mlx-lm 0.32.2",
    what="the base of rotary positions is read by one name",
    backends=("reference",),
)
def _only_the_older_name() -> None:
    def wrong(right: Callable[..., object], config: Mapping[str, object], owner: str) -> object:
        return right({key: value for key, value in config.items() if key not in _ROPE}, owner)

    plant(architecture, "rope_theta", wrong)


@fault(
    "A223e",
    "model.rope_by_newer_name",
    real="",
    what="the base of rotary positions is not read by its older name",
    backends=("reference",),
)
def _only_the_newer_name() -> None:
    def wrong(right: Callable[..., object], config: Mapping[str, object], owner: str) -> object:
        return right({key: value for key, value in config.items() if key != "rope_theta"}, owner)

    plant(architecture, "rope_theta", wrong)
