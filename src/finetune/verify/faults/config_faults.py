"""Faults of settings: dead, misnamed, taken for another, or accepted though there is no such thing."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module

from finetune import train as training
from finetune.backends.reference.model import Array, Backward, ReferencePass
from finetune.config import load
from finetune.config.keys import KEYS, PROFILE_KEY, SECTIONS
from finetune.config.resolve import Plan
from finetune.config.schema import TrainingConfig
from finetune.ports import Session
from finetune.records import AdapterTarget, Batch, ModelShape, Optimization
from finetune.training import prepare
from finetune.verify.faults.fault import fault, plant
from finetune.verify.faults.sessions import plant_session

Added = tuple[Array, Backward]
Planning = Callable[..., AdapterTarget]


@fault("A002", "config.flag_not_wired", real="mlx-examples #1313", what="packing is read and never passed on")
def _packing_not_wired() -> None:
    for room in (prepare, training):
        plant(room, "pack_length", lambda right, *given: None)


@fault("A002b", "config.decay_not_wired", real="", what="weight decay is read and never reaches the optimizer")
def _decay_not_wired() -> None:
    plant(Optimization, "decay_of", lambda right, *given, **named: 0.0)


@fault("A002c", "config.clipping_not_wired", real="", what="the limit of gradients is read and never passed on")
def _clipping_not_wired() -> None:
    def wrong(right: Callable[..., None], session: Session, optimization: Optimization) -> None:
        right(session, replace(optimization, max_grad_norm=math.inf))

    plant_session("prepare_updates", wrong)


@fault("A002d", "config.limit_not_wired", real="", what="the number of rows to read is read and never passed on")
def _limit_not_wired() -> None:
    plant(prepare, "read_rows", lambda right, path, *, limit=None: right(path))


@fault("A002e", "config.accumulation_not_wired", real="", what="accumulation is read, and the loop has a default")
def _accumulation_not_wired() -> None:
    plant(training, "LoopPlan", lambda right, **given: right(**{**given, "gradient_accumulation_steps": 1}))


@fault("A002f", "config.ratio_not_wired", real="", what="how much faster B moves is read and never passed on")
def _ratio_not_wired() -> None:
    for room in ("finetune.training.run", "finetune.verify.trainers.ours_sessions"):
        plant(import_module(room), "Optimization", lambda right, decay, most, **named: right(decay, most))


@fault("A003", "config.zero_is_false", real="torchtune #186", what="a setting that is 0 counts as not set")
def _zero_is_not_set() -> None:
    def wrong(right: Callable[..., load.ConfigSource], *given: object) -> load.ConfigSource:
        source = right(*given)
        source.values = {key: value for key, value in source.values.items() if value or value is None}
        return source

    plant(load, "flag_source", wrong)


@fault("A003b", "config.seed_zero_is_no_seed", real="mlx-lm #1661", what="with seed 0 the adapter is not seeded")
def _seed_zero_makes_any_adapter() -> None:
    def wrong(right: Callable[..., None], session: Session, target: AdapterTarget | None, seed: int) -> None:
        return right(session, target, seed or random.SystemRandom().getrandbits(31))

    plant_session("attach", wrong)


@fault("A003c", "config.order_zero_is_no_seed", real="mlx-lm #1661", what="with seed 0 the order of rows is not seeded")
def _seed_zero_makes_any_order() -> None:
    def wrong(right: Callable[..., list[Batch]], *given: object, seed: int, **named: object) -> list[Batch]:
        return right(*given, seed=seed or random.SystemRandom().getrandbits(31), **named)

    plant(training, "epoch_batches", wrong)


@fault(
    "A004",
    "config.field_misnamed",
    real="axolotl #1445",
    what="rank-stabilised scaling is asked for by a wrong name",
    backends=("reference", "mlx"),
)
def _scaling_misnamed() -> None:
    plant(AdapterTarget, "scale_of", lambda right, target, path: target.alpha_of(path) / target.rank_of(path))


@fault(
    "A004b", "config.alpha_misnamed", real="", what="alpha is asked for by a wrong name and has its default for ever"
)
def _alpha_misnamed() -> None:
    def wrong(right: Planning, rank: int, alpha: float, *given: object, **named: object) -> AdapterTarget:
        return right(rank, 16.0, *given, **named)

    plant(prepare, "AdapterTarget", wrong)


@fault("A004c", "config.patterns_misnamed", real="", what="the ranks that layers have of their own are never asked for")
def _patterns_misnamed() -> None:
    plant(prepare, "AdapterTarget", lambda right, *given, **named: right(*given, **{**named, "rank_pattern": {}}))


def _without_dropout(spared: Callable[[str], bool]) -> None:
    """Plant it where an adapter adds to its layer: some layers are built without dropout."""

    def wrong(right: Callable[..., Added], trip: ReferencePass, path: str, *given: object) -> Added:
        drawn = trip.random
        trip.random = None if spared(path) else drawn
        try:
            return right(trip, path, *given)
        finally:
            trip.random = drawn

    plant(ReferencePass, "adapter_output", wrong)


@fault(
    "A005",
    "config.param_dropped_in_builder",
    real="torchtune #995",
    what="layers of the MLP have no dropout",
    backends=("reference",),
)
def _dropout_not_in_the_mlp() -> None:
    _without_dropout(lambda path: ".mlp." in path)


@fault(
    "A005b",
    "config.dropout_of_one_layer_lost",
    real="torchtune #995",
    what="one layer of attention has no dropout",
    backends=("reference",),
)
def _dropout_not_in_one_layer() -> None:
    _without_dropout(lambda path: path.endswith("o_proj"))


@fault("A007", "config.none_as_string", real="axolotl #3859", what="no value becomes the word None")
def _none_is_a_word() -> None:
    def wrong(right: Callable[..., TrainingConfig], values: Mapping[str, object]) -> TrainingConfig:
        config = right(values)
        tracking = config.tracking.model_copy(update={"name": str(config.tracking.name)})
        return config.model_copy(update={"tracking": tracking})

    plant(load, "unflatten", wrong)


@fault("A009", "config.feature_silently_off", real="unsloth #7234", what="accumulation switches packing off")
def _accumulation_stops_packing() -> None:
    def wrong(right: Callable[..., int | None], plan: Plan) -> int | None:
        return None if plan.config.training.gradient_accumulation_steps > 1 else right(plan)

    for room in (prepare, training):
        plant(room, "pack_length", wrong)


@fault("A009b", "config.dropout_silently_off", real="unsloth #6829", what="targets of one's own switch dropout off")
def _targets_stop_dropout() -> None:
    def wrong(right: Planning, config: TrainingConfig, shape: ModelShape) -> AdapterTarget:
        target = right(config, shape)
        return target if config.adapter.target_modules == "all-linear" else replace(target, dropout=0.0)

    plant(prepare, "adapter_target", wrong)


@fault("A010", "config.layer_filter_matches_nothing", real="PEFT #1024", what="a target that fits no layer is dropped")
def _unknown_target_is_dropped() -> None:
    def wrong(
        right: Callable[..., tuple[str, ...]], shape: ModelShape, target_modules: str | Sequence[str]
    ) -> tuple[str, ...]:
        known = right(shape, "all-linear")
        return known if target_modules == "all-linear" else tuple(name for name in target_modules if name in known)

    plant(prepare, "choose_layers", wrong)


@fault("A010b", "config.pattern_matches_nothing", real="PEFT #1024", what="a pattern that fits no layer says nothing")
def _unknown_pattern_is_ignored() -> None:
    plant(prepare, "check_patterns", lambda right, *given: None)


@fault("A012", "config.unknown_key_ignored", real="", what="a misspelt setting is accepted and does nothing")
def _unknown_setting_is_ignored() -> None:
    def wrong(right: Callable[..., None], source: load.ConfigSource, key: str, value: object) -> None:
        if key in (*SECTIONS, *KEYS, PROFILE_KEY):
            right(source, key, value)

    plant(load.ConfigSource, "add", wrong)
