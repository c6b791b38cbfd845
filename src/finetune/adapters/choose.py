"""Chooses the layers an adapter sits on, and refuses what cannot be adapted before anything is loaded."""

from collections.abc import Iterable, Mapping, Sequence

from finetune.adapters.kinds import kind_of
from finetune.adapters.patterns import check_pattern
from finetune.errors import ModelError
from finetune.models.shape import is_head, token_tables
from finetune.records import AdapterTarget, LinearLayer, ModelShape, fits

_PATTERN_HINT = "put a \\ before ( [ + * ? | that stand for themselves; write the end of a path, such as q_proj"
_ROUTERS = ("router", "gate", "shared_expert_gate")
"""What chooses among experts: no linear layer to PEFT, and not what one means to adapt."""


def choose_layers(shape: ModelShape, target_modules: str | Sequence[str]) -> tuple[str, ...]:
    """The short names of the layers to adapt, such as `q_proj`: all linear layers but routers, or those named.

    Raises:
        ModelError: a name matches no linear layer; the names that exist are listed.
    """
    existing = tuple(dict.fromkeys(layer.name.rsplit(".", 1)[-1] for layer in shape.linear_layers))
    if not existing:
        raise ModelError(f"{shape.architecture} has no linear layer that can be adapted")
    if target_modules == "all-linear":
        return tuple(name for name in existing if name not in _ROUTERS) or existing
    paths = [layer.name for layer in shape.linear_layers]
    unknown = [name for name in target_modules if not ends_with(paths, name)]
    if unknown:
        raise ModelError(
            f"adapter.target_modules: {', '.join(map(repr, unknown))} matches no linear layer of {shape.architecture}",
            hint=f"choose from: {', '.join(existing)}",
        )
    return tuple(target_modules)


def choose_saved(shape: ModelShape, names: Sequence[str], modules: Sequence[str]) -> tuple[str, ...]:
    """The paths of the modules to train whole, beside an adapter on `modules`: those that end with one of `names`.

    Raises:
        ModelError: a name matches no module that has weights, one that gets an adapter, one that is quantised, or a
            table that is tied to the output head: trained on its own it would come apart from it.
    """
    existing = tuple(dict.fromkeys(name.rpartition(".")[0] for name in shape.weights))
    chosen: list[str] = []
    for name in names:
        hit = ends_with(existing, name)
        tied = is_head(name) or any(_is_as_long_as_the_vocabulary(shape, path) for path in hit)
        if shape.tied_head and tied:
            raise ModelError(
                f"adapter.modules_to_save: {name!r} is tied in {shape.architecture}: one table is embedding and output "
                "head, and trained beside an adapter the two would come apart",
                hint="leave it out, or train the whole model with adapter.kind: full",
            )
        if not hit:
            raise ModelError(
                f"adapter.modules_to_save: {name!r} matches no module of {shape.architecture} that has weights",
                hint=f"choose from: {', '.join(_short_names(existing))}",
            )
        if adapted := [path for path in hit if any(ends_with([path], module) for module in modules)]:
            raise ModelError(
                f"adapter.modules_to_save: {name!r} matches {adapted[0]}, which gets an adapter already",
                hint="train it one way: leave it out here, or name the other layers in adapter.target_modules",
            )
        if packed := [path for path in hit if path in shape.quantized]:
            raise ModelError(
                f"adapter.modules_to_save: {name!r} matches {packed[0]}, quantised: it cannot be trained whole",
                hint="leave it out, or train on the full model",
            )
        chosen += hit
    return tuple(dict.fromkeys(chosen))


def choose_rows(shape: ModelShape, ids: Sequence[int], saved: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The rows of these tokens by the paths of the tables that hold them, beside modules that are trained whole.

    Raises:
        ModelError: such a module is a table itself, or as `token_tables`.
    """
    if not ids:
        return {}
    tables = [name.removesuffix(".weight") for name in token_tables(shape)]
    if twice := [path for path in tables if path in saved]:
        raise ModelError(
            f"adapter.modules_to_save: {twice[0]!r} is to be trained whole, and its rows of new tokens by themselves",
            hint="leave it out of adapter.modules_to_save",
        )
    return dict.fromkeys(tables, tuple(ids))


def ends_with(paths: Iterable[str], name: str) -> list[str]:
    """The paths that are `name` or end with it, from a dot on."""
    return [path for path in paths if path == name or path.endswith(f".{name}")]


def check_patterns(shape: ModelShape, target: AdapterTarget) -> None:
    """Refuse a pattern for ranks or alphas that changes nothing.

    Raises:
        ModelError: it is no regular expression, fits no layer that gets an adapter, or comes after others that fit all
            of its layers.
    """
    adapted = [layer.name for layer in _adapted(shape, target)]
    others = [layer.name for layer in shape.linear_layers]
    for setting, patterns in (("rank_pattern", target.rank_pattern), ("alpha_pattern", target.alpha_pattern)):
        left = adapted
        for pattern in patterns:
            try:
                check_pattern(pattern)
            except ValueError as error:
                raise ModelError(f"adapter.{setting}: {pattern!r} {error}", hint=_PATTERN_HINT) from None
            hit = [path for path in adapted if fits(pattern, path)]
            if not hit:
                elsewhere = any(fits(pattern, path) for path in others)
                raise ModelError(
                    f"adapter.{setting}: {pattern!r} fits no "
                    + (
                        f"layer of adapter.target_modules, only others of {shape.architecture}"
                        if elsewhere
                        else f"linear layer of {shape.architecture}"
                    ),
                    hint=f"write the end of a path such as {adapted[0]}, or one of: {', '.join(_short_names(adapted))}",
                )
            if not set(hit) & set(left):
                raise ModelError(
                    f"adapter.{setting}: {pattern!r} never counts: patterns before it fit each of its layers",
                    hint="put the pattern for fewer layers first",
                )
            left = [path for path in left if path not in hit]


def check_rank(shape: ModelShape, target: AdapterTarget) -> None:
    """Refuse a rank above what a layer can hold.

    Raises:
        ModelError: the rank exceeds the smaller side of a targeted layer; the smallest such layer is named.
    """
    if "rank" not in kind_of(target).settings:
        return
    wrong = [layer for layer in _adapted(shape, target) if target.rank_of(layer.name) > min(layer.shape)]
    if not wrong:
        return
    smallest = min(wrong, key=lambda layer: min(layer.shape))
    rank = target.rank_of(smallest.name)
    own = any(fits(pattern, smallest.name) for pattern in target.rank_pattern)
    key = "adapter.rank_pattern: rank" if own else "adapter.rank"
    raise ModelError(
        f"{key} {rank} is above the size of {smallest.name} ({smallest.shape[0]} x {smallest.shape[1]})",
        hint=f"lower {key.partition(':')[0]} to at most {min(smallest.shape)}, or leave that layer out of "
        "adapter.target_modules",
    )


def _adapted(shape: ModelShape, target: AdapterTarget) -> list[LinearLayer]:
    return [layer for layer in shape.linear_layers if target.adapts(layer.name)]


def _is_as_long_as_the_vocabulary(shape: ModelShape, path: str) -> bool:
    return any(
        len(size) == 2 and size[0] == shape.vocab_size
        for name, size in shape.weights.items()
        if name.rpartition(".")[0] == path
    )


def _short_names(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))


def refuse_tied(shapes: Mapping[str, Sequence[int]], words: int, owner: str) -> None:
    """Refuse an adapter with these weights of modules that are trained whole, for a model whose head is tied.

    Raises:
        ModelError: one is a table of as many rows as the model knows words.
    """
    if tables := [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == words]:
        raise ModelError(
            f"{owner} holds {tables[0]}, which is embedding and output head in one: here the two would come apart",
            hint="use the torch backend for this adapter",
        )


def tables_with_rows(shapes: Mapping[str, Sequence[int]], target: AdapterTarget) -> dict[str, tuple[int, ...]]:
    """The rows that an adapter trains by the whole paths of their tables, among weights of these shapes.

    Raises:
        ModelError: there is no such table, or it has no such row.
    """
    paths = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    found: dict[str, tuple[int, ...]] = {}
    for name, rows in target.rows.items():
        hit = ends_with(paths, name)
        if len(hit) != 1 or max(rows, default=0) >= shapes[f"{hit[0]}.weight"][0]:
            what = f"row {max(rows)} of {name!r}, which has none of that number" if hit else f"rows of {name!r}"
            raise ModelError(
                f"the adapter trains {what} in this model",
                hint="use the base model that the adapter was trained on, with its new tokens",
            )
        found[hit[0]] = rows
    return found


def saved_weights(weights: Iterable[str], target: AdapterTarget) -> list[str]:
    """The names of the weights of the modules that are trained whole, in the model's order.

    Raises:
        ModelError: there is no such module.
    """
    names = [(name.rpartition(".")[0], name) for name in weights]
    for path in target.saved:
        if not ends_with([module for module, _ in names], path):
            raise ModelError(
                f"the adapter trains {path!r} whole, which is no module with weights of its own of this model",
                hint="use the torch backend for this adapter, or the base model that it was trained on",
            )
    return [name for module, name in names if any(ends_with([module], path) for path in target.saved)]
