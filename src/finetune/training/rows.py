"""Reads the rows that a run names: which sets there are, what they become, and what is to be said of them."""

from dataclasses import replace
from pathlib import Path

from finetune.config import LoadedConfig, TrainingConfig
from finetune.data.shape import ShapedRows, shape_rows
from finetune.data.shipped import FACTS, REHEARSAL, RETENTION
from finetune.data.sources import SourcedRows, files_of, find_sets, shown_names
from finetune.errors import counted
from finetune.models.locate import SHIPPED


def with_data(loaded: LoadedConfig, notes: list[str]) -> LoadedConfig:
    """The configuration with the rows that follow from it: those that ship, and the held-out part of a set.

    Without data of one's own they are the shipped facts, with rehearsal and retention for the models that know them.
    """
    given = loaded.config.data
    data: dict[str, str | tuple[str, ...]] = {}
    if given.train is None:
        data = {"train": FACTS}
        if loaded.config.model.path in SHIPPED:
            data |= {"rehearsal": REHEARSAL, "retention": RETENTION}
    else:
        sets = find_sets(given.train)
        held = [f"{each.name}:{each.valid}" for each in sets if each.valid is not None]
        if held and given.valid is None and not given.valid_fraction:
            data["valid"] = held[0] if len(held) == 1 else tuple(held)
        for each in sets:
            for part, files in each.others.items():
                if f"{each.name}:{part}" not in held or "valid" not in data:
                    notes.append(f"{each.name}: its part {part} ({counted(len(files), 'file')}) is not read")
    data = {key: value for key, value in data.items() if getattr(given, key) is None}
    config = loaded.config.model_copy(update={"data": given.model_copy(update=data)})
    return LoadedConfig(config, {**loaded.origins, **{f"data.{key}": "derived" for key in data}})


def data_files(config: TrainingConfig) -> tuple[Path, ...]:
    """The files of all rows that the run reads."""
    data = config.data
    return tuple(
        path for names in (data.train, data.valid, data.rehearsal, data.retention) if names for path in files_of(names)
    )


def read_shaped(config: TrainingConfig, key: str, names: tuple[str, ...] = ()) -> ShapedRows:
    """The rows of `data.train` or another such setting, or of these sets in their place.

    What `data.columns` names must be in the training rows.
    """
    data, train = config.data, key == "train"
    limit, weights = (data.limit, data.mix) if train else (None, None)
    rows = SourcedRows(names or getattr(data, key), limit=limit, weights=weights, seed=config.training.seed)
    dpo = config.training.objective == "dpo"
    pairs = dpo and key in ("train", "valid")
    columns = None if dpo and not pairs else data.columns  # those of pairs, which other rows are not
    shaped = shape_rows(rows, columns, data.ignore_columns or (), named=train, pairs=pairs)
    return replace(shaped, sources=rows.sources)


def read_noted(config: TrainingConfig, key: str, notes: list[str]) -> ShapedRows:
    """The rows of a setting, and notes on them; none where none is named."""
    data = config.data
    if getattr(data, key) is None:
        return ShapedRows((), {}, {}, ())
    name = shown_names(getattr(data, key))
    shaped = read_shaped(config, key)
    if len(shaped.sources) > 1 or len(shaped.sources[0].files) > 1:
        for source in shaped.sources:
            left = f", {source.left_out:,} of them left out by its weight (data.mix)" if source.left_out else ""
            read = counted(source.rows, "row", "was/were")
            notes.append(f"{source.name}: {read} read of {counted(len(source.files), 'file')}{left}")
    notes += [f"{name}: {note}" for note in shaped.notes]
    if shaped.ignored_columns:
        notes.append(f"{name}: columns that were not read: {', '.join(shaped.ignored_columns)}")
    if data.limit is not None and key == "train":
        notes.append(f"{name}: only the first {counted(data.limit, 'row', 'was/were')} read (data.limit)")
    return shaped
