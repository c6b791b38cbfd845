"""Faults of settings: dead, misnamed, taken for another, or accepted though there is no such thing."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from finetune import train as training
from finetune.adapters.peft_files import Layers
from finetune.backends.reference import session as reference
from finetune.backends.reference.adapter import ReferenceAdapter
from finetune.backends.reference.model import Array, Backward, ReferencePass
from finetune.config import load
from finetune.config.keys import KEYS, PROFILE_KEY, SECTIONS
from finetune.config.resolve import Plan
from finetune.config.schema import TrainingConfig
from finetune.ports import Session
from finetune.records import AdapterTarget, Batch, ModelShape, Optimization
from finetune.training import prepare, rows, run
from finetune.verify.faults.fault import fault, in_place_of, plant, planted_by
from finetune.verify.faults.sessions import plant_session

Added = tuple[Array, Backward]
Planning = Callable[..., AdapterTarget]
Doing = Callable[..., None]
Dealing = Callable[..., list[Batch]]


@fault("A002", "config.flag_not_wired", "mlx-examples #1313")
def _packing_not_wired() -> None:
    """Packing is read and never passed on."""
    for room in (prepare, training):
        plant(room, "pack_length", lambda right, *given: None)


@fault("A002b", "config.decay_not_wired")
def _decay_not_wired() -> None:
    """Weight decay is read and never reaches the optimizer."""
    plant(Optimization, "decay_of", lambda right, *given, **named: 0.0)


@fault("A002c", "config.clipping_not_wired")
@planted_by(plant_session, "prepare_updates")
def _clipping_not_wired(right: Doing, session: Session, optimization: Optimization) -> None:
    """The limit of gradients is read and never passed on."""
    right(session, replace(optimization, max_grad_norm=math.inf))


@fault("A002d", "config.limit_not_wired")
def _limit_not_wired() -> None:
    """The number of rows to read is read and never passed on."""
    plant(rows, "SourcedRows", lambda right, names, **given: right(names, **{**given, "limit": None}))


@fault("A002e", "config.accumulation_not_wired")
def _accumulation_not_wired() -> None:
    """Accumulation is read, and the loop has a default."""
    plant(training, "LoopPlan", lambda right, **given: right(**{**given, "gradient_accumulation_steps": 1}))


@fault("A002f", "config.ratio_not_wired")
def _ratio_not_wired() -> None:
    """How much faster B moves is read and never passed on."""
    plant(run, "Optimization", lambda right, *given, **named: replace(right(*given, **named), loraplus_lr_ratio=1.0))


@fault("A003", "config.zero_is_false", "torchtune #186")
@in_place_of("flag_source", load)
def _zero_is_not_set(right: Callable[..., load.ConfigSource], *given: object) -> load.ConfigSource:
    """A setting that is 0 counts as not set."""
    source = right(*given)
    source.values = {key: value for key, value in source.values.items() if value or value is None}
    return source


@fault("A003b", "config.seed_zero_is_no_seed", "mlx-lm #1661")
@fault("A145b", "seed.zero_is_none", "mlx-lm #1661")
@planted_by(plant_session, "attach")
def _seed_zero_makes_any_adapter(right: Doing, session: Session, target: AdapterTarget | None, seed: int) -> None:
    """Seed 0 counts as no seed, so that the adapter is drawn from the clock."""
    return right(session, target, seed or random.SystemRandom().getrandbits(31))


@fault("A003c", "config.order_zero_is_no_seed", "mlx-lm #1661")
@in_place_of("epoch_batches", training)
def _seed_zero_makes_any_order(right: Dealing, *given: object, seed: int, **named: object) -> list[Batch]:
    """With seed 0 the order of rows is not seeded."""
    return right(*given, seed=seed or random.SystemRandom().getrandbits(31), **named)


@fault("A004", "config.field_misnamed", "axolotl #1445", backends=("reference", "mlx"))
@fault("A187", "adapter.rslora_set_scale", "PEFT #2733", backends=("reference", "mlx"))
def _scaling_misnamed() -> None:
    """Rank-stabilised scaling is asked for by a wrong name, so that an adapter is scaled as a plain one."""
    plant(AdapterTarget, "scale_of", lambda right, target, path: target.alpha_of(path) / target.rank_of(path))


@fault("A004b", "config.alpha_misnamed")
@in_place_of("AdapterTarget", prepare)
def _alpha_misnamed(right: Planning, rank: int, alpha: float, *given: object, **named: object) -> AdapterTarget:
    """Alpha is asked for by a wrong name and has its default for ever."""
    return right(rank, 16.0, *given, **named)


@fault("A004c", "config.patterns_misnamed")
def _patterns_misnamed() -> None:
    """The ranks that layers have of their own are never asked for."""
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


@fault("A005", "config.param_dropped_in_builder", "torchtune #995", backends=("reference",))
def _dropout_not_in_the_mlp() -> None:
    """Layers of the MLP have no dropout."""
    _without_dropout(lambda path: ".mlp." in path)


@fault("A005b", "config.dropout_of_one_layer_lost", "torchtune #995", backends=("reference",))
def _dropout_not_in_one_layer() -> None:
    """One layer of attention has no dropout."""
    _without_dropout(lambda path: path.endswith("o_proj"))


@fault("A007", "config.none_as_string", "axolotl #3859")
@in_place_of("unflatten", load)
def _none_is_a_word(right: Callable[..., TrainingConfig], values: Mapping[str, object]) -> TrainingConfig:
    """No value becomes the word None."""
    config = right(values)
    tracking = config.tracking.model_copy(update={"name": str(config.tracking.name)})
    return config.model_copy(update={"tracking": tracking})


@fault("A009", "config.feature_silently_off", "unsloth #7234")
@in_place_of("pack_length", prepare, training)
def _accumulation_stops_packing(right: Callable[..., int | None], plan: Plan) -> int | None:
    """Accumulation switches packing off."""
    return None if plan.config.training.gradient_accumulation_steps > 1 else right(plan)


@fault("A009b", "config.dropout_silently_off", "unsloth #6829")
@in_place_of("adapter_target", prepare)
def _targets_stop_dropout(right: Planning, config: TrainingConfig, *given: object) -> AdapterTarget:
    """Targets of one's own switch dropout off."""
    target = right(config, *given)
    return target if config.adapter.target_modules == "all-linear" else replace(target, dropout=0.0)


@fault("A010", "config.layer_filter_matches_nothing", "PEFT #1024")
@in_place_of("choose_layers", prepare)
def _unknown_target_is_dropped(
    right: Callable[..., tuple[str, ...]], shape: ModelShape, target_modules: str | Sequence[str]
) -> tuple[str, ...]:
    """A target that fits no layer is dropped."""
    known = right(shape, "all-linear")
    return known if target_modules == "all-linear" else tuple(name for name in target_modules if name in known)


@fault("A010b", "config.pattern_matches_nothing", "PEFT #1024")
def _unknown_pattern_is_ignored() -> None:
    """A pattern that fits no layer says nothing."""
    plant(prepare, "check_patterns", lambda right, *given: None)


@fault("A012", "config.unknown_key_ignored")
@in_place_of("add", load.ConfigSource)
def _unknown_setting_is_ignored(right: Doing, source: load.ConfigSource, key: str, value: object) -> None:
    """A misspelt setting is accepted and does nothing."""
    if key in (*SECTIONS, *KEYS, PROFILE_KEY):
        right(source, key, value)


@fault("A010c", "config.last_blocks_only", "mlx-lm 0.32.2, PEFT #3658", backends=("reference",))
@in_place_of("draw_adapter", reference)
def _first_block_is_spared(
    right: Callable[..., ReferenceAdapter], weights: Mapping[str, Array], layers: Layers, *given: object
) -> ReferenceAdapter:
    """An adapter sits on the last blocks alone, as many as somebody once thought enough."""
    return right(weights, {path: sizes for path, sizes in layers.items() if ".layers.0." not in path}, *given)
