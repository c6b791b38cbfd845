"""Opens finished runs again: to score them, or to talk to them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.artifacts.run_folder import RunFolder
from finetune.artifacts.write import describe_files
from finetune.assembly.encoder import Encoder
from finetune.assembly.observe import Observation, observe
from finetune.assembly.prepare import Prepared, prepare
from finetune.assembly.record import base_files, data_files
from finetune.backends import open_backend
from finetune.config import LoadedConfig, TrainingConfig, load_plan
from finetune.errors import DataError, ModelError, TemplateError
from finetune.models.locate import locate_model
from finetune.models.shape import read_shape
from finetune.ports import Session
from finetune.records import Conversation, ModelLocation


def reopen(path: Path) -> tuple[Prepared, Session]:
    """A finished run as it ended: its data prepared again, its base model loaded, its adapter on it.

    Raises:
        FineTuneError: the run is not finished, or its model, data or adapter cannot be used any more.
    """
    folder = RunFolder.finished(path)
    plan = load_plan(folder.plan)
    prepared = prepare(LoadedConfig(plan.config, plan.origins))
    if changed := _changed(folder.read_manifest()["data"].get("files"), data_files(prepared)):
        raise DataError(
            f"the data that {path} was trained on has changed since: {', '.join(changed)}",
            hint="restore the files of run.json",
        )
    template = _saved(folder, plan.config) / "chat_template.jinja"
    if template.read_text(encoding="utf-8") != prepared.encoder.source.jinja:
        raise TemplateError(f"the template that {path} was trained with has changed since", hint="restore the file")
    return prepared, _tuned_session(folder, plan.config, prepared.location, prepared.encoder)


def compare(prepared: Prepared, session: Session) -> tuple[Observation, Observation]:
    """A look at the base and a look at the tuned model that `reopen` gave.

    Raises:
        FineTuneError: the base cannot be loaded again.
    """
    tuned = observe(session, prepared)
    if prepared.target is not None:
        with session.adapter_disabled():
            return observe(session, prepared), tuned
    # Only what is not quantised can be trained whole, so this base is not.
    config = prepared.plan.config
    base = open_backend(config.backend).open(prepared.location, config.model.dtype, prepared.encoder.tokenizer.pad_id)
    return observe(base, prepared), tuned


def talker(path: Path, *, max_new_tokens: int) -> Callable[[Conversation], str]:
    """A function that lets the fine-tuned model of a finished run answer a conversation; needs no data.

    Raises:
        FineTuneError: as `reopen`.
    """
    folder = RunFolder.finished(path)
    config = load_plan(folder.plan).config
    location = locate_model(config.model.path, revision=config.model.revision)
    # A template from a file may have moved since; the copy that travels with what was saved has not.
    own = config.template.name.endswith(".jinja")
    saved = _saved(folder, config)
    encoder = Encoder(location, str(saved / "chat_template.jinja") if own else config.template.name)
    session = _tuned_session(folder, config, location, encoder)

    context = read_shape(location.folder).context_length

    def answer(conversation: Conversation) -> str:
        ids = encoder.prompt_ids(conversation)
        if len(ids) >= context:
            raise DataError(
                f"the conversation has {len(ids)} tokens, and the model reads {context}", hint="ask something shorter"
            )
        return encoder.tokenizer.decode(session.generate([ids], max_new_tokens, encoder.stop_ids)[0]).strip()

    return answer


def _saved(folder: RunFolder, config: TrainingConfig) -> Path:
    """Where a run keeps what it trained, an adapter or the whole model: byte for byte what it wrote there."""
    saved = folder.model if config.adapter.kind == "full" else folder.adapter
    found = describe_files(saved)
    now = {f"{saved.name}/{file['path']}": {**file, "path": f"{saved.name}/{file['path']}"} for file in found}
    written = [file for file in folder.read_manifest()["artifacts"] if file["path"].startswith(f"{saved.name}/")]
    # The model card is for people, who may well add to it.
    changed = [
        file["path"] for file in written if now.get(file["path"]) != file and not file["path"].endswith("README.md")
    ]
    if changed:
        raise ModelError(
            f"the {saved.name} in {saved} is not the one that was trained: changed or gone: {', '.join(changed)}",
            hint="restore the folder, or train again",
        )
    return saved


def _changed(before: Any, now: list[dict[str, Any]]) -> list[str]:
    """The names of files that are not what they were; those of one list alone are among them."""
    old = {file["path"]: file for file in before or []}
    new = {file["path"]: file for file in now}
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _tuned_session(folder: RunFolder, config: TrainingConfig, location: ModelLocation, encoder: Encoder) -> Session:
    """What `_saved` has found good, on the base that it was trained on or alone."""
    if differing := _changed(folder.read_manifest()["model"]["files"], base_files(location)):
        raise ModelError(
            f"the base model {location.name!r} is not the one that {folder.path} was trained on: "
            f"changed or gone: {', '.join(differing)}",
            hint="get the model revision that run.json names",
        )
    whole = config.adapter.kind == "full"
    if whole:
        location = ModelLocation(location.name, folder.model.resolve(), "local")
    session = open_backend(config.backend).open(
        location, config.model.dtype, encoder.tokenizer.pad_id, quantize=config.model.quantization
    )
    if not whole:
        session.load_adapter(folder.adapter)
    return session
