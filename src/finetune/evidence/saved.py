"""Saves what a run trained, finds it again, checks that it has not changed, and opens a session on it."""

from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path

from finetune.backends import open_backend
from finetune.chat.catalog import Variable
from finetune.chat.encoder import Encoder
from finetune.chat.sandbox import variables_read
from finetune.chat.tokenizer import FileTokenizer
from finetune.config import LoadedConfig, TrainingConfig, load_plan
from finetune.config.schema import TemplateSpec
from finetune.errors import DataError, ModelError
from finetune.evidence.record import base_files, data_files
from finetune.files import describe_files, write_json, write_text
from finetune.models.travel import without_places
from finetune.ports import Session
from finetune.records import ModelLocation
from finetune.report.card import CARD
from finetune.run.folder import RunFolder
from finetune.training.prepare import Prepared, prepare


def save_trained(prepared: Prepared, session: Session, folder: Path) -> None:
    """Write the adapter or the whole model, with tokenizer, template and stops, into an existing folder."""
    session.save_model(folder) if prepared.target is None else session.save_adapter(folder)
    # PEFT's own card is blank but for the path of the base on this machine; ours is written when all is measured.
    (folder / CARD).unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        source = prepared.location.folder / name
        if source.exists():
            (folder / name).write_bytes(source.read_bytes())
    # A base may name the folder that it was made in, and its tokenizer, too.
    for file in folder.glob("*.json"):
        content = file.read_bytes()
        if (public := without_places(content)) != content:
            file.write_bytes(public)
    # The template trained on travels along, whichever the model shipped.
    write_text(folder / "chat_template.jinja", prepared.encoder.source.jinja)
    # So does where to stop: without it a model that learned to stop is asked to go on.
    write_json(folder / "generation_config.json", prepared.encoder.generation_settings())


def saved_in(folder: RunFolder, config: TrainingConfig) -> Path:
    """Where a run keeps what it trained, an adapter or the whole model: byte for byte what it wrote there.

    Raises:
        ModelError: a file has changed or is gone.
    """
    saved = folder.model if config.adapter.kind == "full" else folder.adapter
    found = describe_files(saved)
    now = {f"{saved.name}/{file['path']}": {**file, "path": f"{saved.name}/{file['path']}"} for file in found}
    written = [file for file in folder.read_manifest()["artifacts"] if file["path"].startswith(f"{saved.name}/")]
    # The model card is for people, who may well add to it.
    odd = [file["path"] for file in written if now.get(file["path"]) != file and not file["path"].endswith("README.md")]
    if odd:
        raise ModelError(
            f"the {saved.name} in {saved} is not the one that was trained: changed or gone: {', '.join(odd)}",
            hint="restore the folder, or train again",
        )
    return saved


def changed(before: Sequence[Mapping[str, object]] | None, now: Sequence[Mapping[str, object]]) -> list[str]:
    """The names of files that are not what they were; those of one list alone are among them."""
    old = {file["path"]: file for file in before or []}
    new = {file["path"]: file for file in now}
    return sorted(str(name) for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def open_encoder(
    folder: RunFolder,
    config: TrainingConfig,
    location: ModelLocation,
    *,
    today: date | None = None,
    given: Mapping[str, Variable] | None = None,
) -> Encoder:
    """The run's template with the tokenizer of its base model; it prints the day of training, or another.

    Args:
        given: variables that a server sets by itself; those that the template does not read, or that the run set, stay
            as they are.
    """
    asked = _kept_template(folder, config)
    day = today or date.fromisoformat(asked.date)
    tokenizer = FileTokenizer(location.folder, config.tokens.learned)
    encoder = Encoder(location, asked.name, tokenizer, today=day, variables=asked.variables)
    read = variables_read(encoder.source.jinja)
    more = {name: value for name, value in (given or {}).items() if name in read}
    if not more:
        return encoder
    return Encoder(location, asked.name, tokenizer, today=day, variables={**more, **(asked.variables or {})})


def _kept_template(folder: RunFolder, config: TrainingConfig) -> TemplateSpec:
    """The template that a run was trained with: one from a file may have moved since, and the run's copy has not."""
    if not config.template.name.endswith(".jinja"):
        return config.template
    kept = saved_in(folder, config) / "chat_template.jinja"
    # The variables are in the copy.
    return config.template.model_copy(update={"name": str(kept), "variables": None})


def check_saved(folder: RunFolder, config: TrainingConfig, location: ModelLocation) -> Path:
    """The folder of what was trained; it and the base model's files are byte for byte those of the run.

    Raises:
        ModelError: a file has changed or is gone.
    """
    if differing := changed(folder.read_manifest()["model"]["files"], base_files(location)):
        raise ModelError(
            f"the base model {location.name!r} is not the one that {folder.path} was trained on: "
            f"changed or gone: {', '.join(differing)}",
            hint="get the model revision that run.json names",
        )
    return saved_in(folder, config)


def open_model(config: TrainingConfig, location: ModelLocation, encoder: Encoder) -> Session:
    """A model, loaded as the configuration says."""
    model, pad_id = config.model, encoder.tokenizer.pad_id
    backend = open_backend(config.backend)
    return backend.open(location, model.dtype, pad_id, quantize=config.quantization, device=model.device)


def open_tuned(
    folder: RunFolder, config: TrainingConfig, location: ModelLocation, opener: Callable[[ModelLocation], Session]
) -> Session:
    """The adapter on its base, or the whole model, opened by `opener`.

    Raises:
        ModelError: as `check_saved`.
    """
    saved = check_saved(folder, config, location)
    if saved == folder.model:
        return opener(ModelLocation(location.name, saved.resolve(), "local"))
    session = opener(location)
    session.load_adapter(saved)
    return session


def prepare_again(folder: RunFolder) -> Prepared:
    """A finished run's data, prepared again.

    Raises:
        FineTuneError: the data has changed since, or cannot be used any more.
    """
    plan = load_plan(folder.plan)
    config = plan.config.model_copy(update={"template": _kept_template(folder, plan.config)})
    prepared = prepare(LoadedConfig(config, plan.origins))
    if differing := changed(folder.read_manifest()["data"].get("files"), data_files(prepared)):
        raise DataError(
            f"the data that {folder.path} was trained on has changed since: {', '.join(differing)}",
            hint="restore the files of run.json",
        )
    return prepared
