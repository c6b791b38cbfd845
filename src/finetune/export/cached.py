"""Model folders that are made in the cache: of a GGUF file, or of a model that lacks tokens which are to be learned.

Each says what it was made from, and a run writes that down when it begins: a folder that is gone is made again from it.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.chat.tokenizer import FileTokenizer
from finetune.config import LoadedConfig, load_plan
from finetune.errors import ModelError
from finetune.export.gguf import Teller
from finetune.export.import_gguf import import_gguf
from finetune.export.new_tokens import MADE_FROM, add_tokens, cache_folder, grown_name, with_new_tokens
from finetune.files import file_hash, write_json
from finetune.models.locate import locate_model
from finetune.reading import read_json
from finetune.run.folder import RunFolder


def with_model_folder(loaded: LoadedConfig, *, tell: Teller) -> LoadedConfig:
    """The same configuration, whose model is a folder that can be trained as it is.

    A GGUF file is imported, and a model that lacks tokens which are to be learned is written anew with them.

    Raises:
        FineTuneError: as `import_gguf` and `with_new_tokens`.
    """
    config = loaded.config
    if not config.model.path.lower().endswith(".gguf"):
        return with_new_tokens(loaded, tell=tell)
    folder = _imported(Path(config.model.path).expanduser(), tell=tell)
    model = config.model.model_copy(update={"path": str(folder)})
    return with_new_tokens(replace(loaded, config=config.model_copy(update={"model": model})), tell=tell)


def _imported(source: Path, *, tell: Teller) -> Path:
    """The folder of a GGUF file's model in the cache, where it is imported once for as long as the file is the same."""
    if not source.is_file():
        raise ModelError(f"model {str(source)!r} does not exist", hint="name a GGUF file, a model folder or a hub id")
    folder = cache_folder() / "imported" / _imported_name(source)
    if not folder.exists():
        tell(f"importing {source} into {folder} (once; again only when the file changes)")
        import_gguf(source, output=folder, tell=tell)
    else:
        tell(f"{source} was imported before, into {folder}")
    if not (folder / MADE_FROM).exists():
        write_json(folder / MADE_FROM, {"path": str(source.resolve())})
    return locate_model(str(folder)).folder


def _imported_name(source: Path) -> str:
    return f"{source.stem}-{file_hash(source)[:16]}"


def made_from(folder: Path) -> dict[str, Any]:
    """What a model folder says that it was made from; nothing where it was not made in the cache."""
    path = folder / MADE_FROM
    try:
        told: dict[str, Any] = read_json(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint="make the model again") from None
    return told


def with_base(run: Path, *, tell: Teller) -> Path:
    """The same run, whose base lies where it lay: one that was made in the cache and is gone is made again.

    Raises:
        FineTuneError: what it was made from is gone or has changed, or it cannot be written there.
    """
    folder = RunFolder(run)
    if not folder.plan.is_file():
        return run
    base = Path(load_plan(folder.plan).config.model.path)
    if not base.is_absolute() or base.exists():
        return run
    started = folder.begun()
    if started and started.made_from:
        tell(f"the base of {run} is gone from the cache: making {base} again")
        _make_again(base, started.made_from, tell)
    return run


def _make_again(folder: Path, made: Mapping[str, Any], tell: Teller) -> None:
    source, tokens = Path(str(made["path"])), made.get("tokens")
    if tokens is None:
        if not source.is_file():
            raise ModelError(
                f"{folder} is gone, and so is {source}, which it was made from", hint="restore the GGUF file"
            )
        _require_same(_imported_name(source), folder, source)
        import_gguf(source, output=folder, tell=tell)
        write_json(folder / MADE_FROM, dict(made))
        return
    if made.get("made_from") and not source.exists():
        _make_again(source, made["made_from"], tell)
    location = locate_model(str(made["path"]), revision=made.get("revision"))
    _require_same(grown_name(location, tokens), folder, source)
    add_tokens(location, FileTokenizer(location.folder), tokens, folder, revision=made.get("revision"))


def _require_same(name: str, folder: Path, source: Path) -> None:
    """Names of cached folders end with a hash of what they are made from."""
    if name != folder.name:
        raise ModelError(
            f"{folder} is gone, and {source}, which it was made from, has changed since",
            hint="restore the files of that model as they were, or train again",
        )
