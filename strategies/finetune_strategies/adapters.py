"""LoRA adapters that fit a model, and near misses with the reason for which they must be refused."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from hypothesis import strategies as st

from finetune.adapters.kinds import ADAPTER_KINDS
from finetune.records import AdapterTarget, LinearLayer, ModelShape, fits
from finetune_strategies.models import Config, model_configs, model_shapes, shape_of_config
from finetune_strategies.picks import EITHER, between, pick

KINDS = tuple(sorted(ADAPTER_KINDS, key=lambda name: -len(ADAPTER_KINDS[name].tensors)))
"""The kinds of adapters, those with most tensors first: what Hypothesis shrinks to."""
_DRAWN = (*KINDS, *(name for name in KINDS if "rank" in ADAPTER_KINDS[name].settings))
"""What has a rank is drawn twice as often: it has patterns to go wrong with, too."""
_ALPHAS = (7.0, 0.5, 16.0, 3.0)


@dataclass(frozen=True)
class AdaptedModel:
    """A model's config and shape with an adapter that fits it."""

    config: Config
    shape: ModelShape
    target: AdapterTarget


@dataclass(frozen=True)
class UnfitAdapter:
    """An adapter that this model cannot have: the reason, and every word that the refusal must hold."""

    shape: ModelShape
    target: AdapterTarget
    reason: Literal["rank too large", "matches nothing"]
    named: tuple[str, ...]


def layer_names(shape: ModelShape) -> tuple[str, ...]:
    """The short names of a model's linear layers, such as `q_proj`, each once."""
    return tuple(dict.fromkeys(_short(layer) for layer in shape.linear_layers))


def adapted_layers(shape: ModelShape, target: AdapterTarget) -> tuple[LinearLayer, ...]:
    """The layers that an adapter sits on: those with a name, or the end of a path, that it names."""
    return tuple(
        layer
        for layer in shape.linear_layers
        if any(layer.name == name or layer.name.endswith(f".{name}") for name in target.modules)
    )


@st.composite
def adapter_targets(
    draw: st.DrawFn, shape: ModelShape, *, paths: bool = False, dropouts: tuple[float, ...] = (0.0, 0.1, 0.4)
) -> AdapterTarget:
    """Adapters that fit the shape: on some of its layers or on all, alpha never the rank, the rank seldom a divisor.

    `paths`: layers may be named by a whole path or the end of one as well, as a backend takes them.
    """
    modules = draw(_named(tuple(layer.name for layer in shape.linear_layers), layer_names(shape), paths=paths))
    sides = [side for layer in adapted_layers(shape, AdapterTarget(1, 1.0, 0.0, modules)) for side in layer.shape]
    rank = draw(_ranks(*sorted(set(sides))))
    alpha = draw(pick(*(alpha for alpha in _ALPHAS if alpha != rank)))
    return AdapterTarget(rank, alpha, draw(pick(*dropouts)), modules)


@cache
def _ranks(*sides: int) -> st.SearchStrategy[int]:
    ranks = st.integers(1, min(sides))
    odd = [rank for rank in range(1, min(sides) + 1) if any(side % rank for side in sides)]
    return st.sampled_from(odd) | ranks if odd else ranks


@st.composite
def varied_targets(
    draw: st.DrawFn, shape: ModelShape, *, dropouts: tuple[float, ...] = (0.0, 0.1, 0.4)
) -> AdapterTarget:
    """Adapters of any kind that fit the shape, with what that kind takes: scaling, patterns; and whole modules."""
    plain = draw(adapter_targets(shape, dropouts=dropouts))
    layers = adapted_layers(shape, plain)
    kind, saved = draw(pick(*_DRAWN)), _some_of(2, *_whole_modules(shape, layers)).map(tuple)
    if "rank" not in ADAPTER_KINDS[kind].settings:
        return AdapterTarget(1, 1.0, 0.0, plain.modules, kind, saved=draw(saved))
    ranks, alphas = draw(_patterns(layers)), draw(_patterns(layers))
    sides = {key: min(min(layer.shape) for layer in layers if fits(key, layer.name)) for key in ranks}
    return replace(
        plain,
        kind=kind,
        scaling=draw(pick("rank_stabilized", "standard")),
        rank_pattern={key: draw(between(1, most)) for key, most in sides.items()},
        alpha_pattern={key: draw(pick(5.0, 0.3, 12.0)) for key in alphas},
        saved=draw(saved),
    )


def varied_models(configs: st.SearchStrategy[Config] | None = None, **how: Any) -> st.SearchStrategy[AdaptedModel]:
    """Models, of any config or of those given, each with an adapter of any kind; `how` as for `varied_targets`."""

    def adapt(config: Config) -> st.SearchStrategy[AdaptedModel]:
        shape = shape_of_config(config)
        return varied_targets(shape, **how).map(lambda target: AdaptedModel(config, shape, target))

    return (model_configs() if configs is None else configs).flatmap(adapt)


@st.composite
def _patterns(draw: st.DrawFn, layers: tuple[LinearLayer, ...]) -> list[str]:
    """Patterns for some of the layers; where several fit one, each is still the first to fit another."""
    short = [_short(layer) for layer in layers]
    ends = [".".join(layer.name.split(".")[-3:]) for layer in layers]
    regular = [rf"{name[:2]}.*" for name in short] + [rf".*\.0\..*\.{name}|x{name}" for name in short]
    given = draw(_some_of(3, *dict.fromkeys([*short, *ends, *regular])))
    kept, left = [], [layer.name for layer in layers]
    for key in given:
        if any(fits(key, path) for path in left):
            kept.append(key)
            left = [path for path in left if not fits(key, path)]
    return kept


@cache
def _some_of(most: int, *names: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names), max_size=most, unique=True)


def _whole_modules(shape: ModelShape, layers: tuple[LinearLayer, ...]) -> list[str]:
    """Norms, untied tables, and in a Llama linear layers that get no adapter."""
    taken, linear = {layer.name for layer in layers}, {layer.name for layer in shape.linear_layers}
    names = {name.rpartition(".")[0]: size for name, size in shape.weights.items() if name.endswith(".weight")}
    tables = [path for path, size in names.items() if len(size) == 2 and size[0] == shape.vocab_size]
    free = linear if shape.architecture != "LlamaForCausalLM" else set()
    others = [path for path in names if path not in taken | free and path not in tables]
    return others + ([] if shape.tied_head else 3 * tables)


def adapted_models(configs: st.SearchStrategy[Config] | None = None, **how: Any) -> st.SearchStrategy[AdaptedModel]:
    """Models, of any config or of those given, each with an adapter that fits it; `how` as for `adapter_targets`."""

    def adapt(config: Config) -> st.SearchStrategy[AdaptedModel]:
        shape = shape_of_config(config)
        return adapter_targets(shape, **how).map(lambda target: AdaptedModel(config, shape, target))

    return (model_configs() if configs is None else configs).flatmap(adapt)


def any_adapter_targets() -> st.SearchStrategy[AdapterTarget]:
    """Adapters of any kind, of tiny models that need not be known."""
    return model_shapes().flatmap(lambda shape: adapter_targets(shape) | varied_targets(shape))


_SHAPES = model_shapes()


@st.composite
def unfit_adapters(draw: st.DrawFn) -> UnfitAdapter:
    """Adapters that are right but for one thing: a rank above a layer's size, or a name that no layer has."""
    shape = draw(_SHAPES)
    target = draw(adapter_targets(shape))
    if draw(EITHER):
        least = min(min(layer.shape) for layer in adapted_layers(shape, target))
        rank = least + draw(between(1, 3))
        too_large = AdapterTarget(rank, target.alpha, target.dropout, target.modules)
        return UnfitAdapter(shape, too_large, "rank too large", (f"rank {rank}", f"at most {least}"))
    right = draw(pick(*target.modules))
    name = draw(pick(right[:-1], f"{right}_", right.upper(), f"x{right}", "lm_head", f"{right} ", "all-linear"))
    at = draw(between(0, len(target.modules)))
    modules = (*target.modules[:at], name, *target.modules[at:])
    named = (repr(name), *layer_names(shape))
    return UnfitAdapter(shape, AdapterTarget(target.rank, target.alpha, 0.0, modules), "matches nothing", named)


@cache
def _named(layers: tuple[str, ...], short: tuple[str, ...], *, paths: bool) -> st.SearchStrategy[tuple[str, ...]]:
    ends = [".".join(layer.split(".")[-2:]) for layer in layers]
    names = list(dict.fromkeys([*short, *(ends if paths else []), *(layers if paths else [])]))
    some = st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True).map(tuple)
    return some | st.just(short)


def _short(layer: LinearLayer) -> str:
    return layer.name.rsplit(".", 1)[-1]
