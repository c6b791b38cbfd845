"""Faults of reading a model: its config.json says something, and the model is made without it."""

from collections.abc import Callable, Mapping

from finetune.backends.reference import architecture
from finetune.verify.faults.fault import fault, in_place_of

_ROPE = ("rope_parameters", "rope_scaling")


@fault("A223d", "model.rope_by_older_name", "mlx-lm 0.32.2", backends=("reference",))
@in_place_of("rope_theta", architecture)
def _only_the_older_name(right: Callable[..., object], config: Mapping[str, object], owner: str) -> object:
    """The base of rotary positions is read by one name."""
    return right({key: value for key, value in config.items() if key not in _ROPE}, owner)


@fault("A223e", "model.rope_by_newer_name", backends=("reference",))
@in_place_of("rope_theta", architecture)
def _only_the_newer_name(right: Callable[..., object], config: Mapping[str, object], owner: str) -> object:
    """The base of rotary positions is not read by its older name."""
    return right({key: value for key, value in config.items() if key != "rope_theta"}, owner)
