"""Gives a model tokens that it lacks: a folder in which its tokenizer knows them and its tables have a row for each.

A new row is the mean of the rows of all tokens that the model knew, of the embedding and, where it is a table of its
own, of the output head. The head then gives a new token the mean of all their logits, and since the exponential of a
mean is at most the mean of exponentials, at most the mean of their probabilities: 1 / n of n tokens. So the model says
what it said, less a share of that size for each new token. Every other row keeps its bytes.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.chat.tokenizer import FileTokenizer
from finetune.config import LoadedConfig, TrainingConfig, new_token_problems
from finetune.errors import ConfigError, ExportError, ModelError, Problem
from finetune.evidence.record import base_files
from finetune.export.by_name import ENDS
from finetune.export.gguf import Teller
from finetune.export.merged_folder import TOKENIZER_FILES
from finetune.export.model_files import ModelFiles, to_bfloat16
from finetune.export.sources import DTYPES, Files
from finetune.files import check_space, make_folder, write_folder, write_json
from finetune.models.locate import locate_model
from finetune.models.shape import is_head, read_config, read_shape, refuse_leading_out, token_tables, weight_files
from finetune.reading import read_json
from finetune.records import ModelLocation, ModelShape

Array = NDArray[Any]
_SIDE_BYTES = 64 << 20
_SLICE = 4096
"""Rows that are summed up at once."""
MADE_FROM = "made_from.json"
"""What a folder in the cache says of the model that it was made from."""
_OTHERS = ("generation_config.json", "chat_template.jinja", "README.md")


class WithTokens(Files):
    """The weights of a model with rows for new tokens, every other byte as it was."""

    def __init__(self, folder: Path, shape: ModelShape, ids: Sequence[int]) -> None:
        super().__init__(weight_files(folder))
        self._stored = Files(weight_files(folder))
        self._tables, self._ids = token_tables(shape), sorted(ids)
        self.rows = max(shape.vocab_size, max(ids) + 1)
        # A tied head that was saved a second time would keep its old size.
        self._names = [name for name in super().names() if not (shape.tied_head and is_head(name))]
        odd = [f"{name} as {self.kind(name)}" for name in self._tables if self.kind(name) not in DTYPES]
        if odd or shape.quantized:
            raise ModelError(
                f"{folder} holds {odd[0] if odd else 'quantised matrices'}: new tokens need tables of plain numbers",
                hint="add the tokens to the full model that it was made from",
            )

    def names(self) -> Sequence[str]:
        """The names of all weights."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one: tables have as many rows as are needed."""
        shape = super().shape(name)
        return (self.rows, *shape[1:]) if name in self._tables else shape

    def size(self, name: str) -> int:
        """How many bytes one takes."""
        size = super().size(name)
        return size // super().shape(name)[0] * self.rows if name in self._tables else size

    def raw(self, name: str) -> bytes:
        """One, byte for byte as it is to be written."""
        content = self._stored.raw(name)
        if name not in self._tables:
            return content
        kind, (known, width) = self.kind(name), self._stored.shape(name)
        stored = np.frombuffer(content, DTYPES[kind]).reshape(known, width)
        table = np.empty((self.rows, width), stored.dtype)
        table[:known] = stored
        table[known:] = 0
        mean = _mean(stored[: self._ids[0]], kind)
        table[self._ids] = to_bfloat16(mean) if kind == "BF16" else mean
        return table.tobytes()


def _mean(stored: Array, kind: str) -> Array:
    """The mean of rows, summed in float64, as float32."""
    total = np.zeros(stored.shape[1])
    for start in range(0, len(stored), _SLICE):
        some = stored[start : start + _SLICE]
        wide = (some.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else some
        total += wide.sum(axis=0, dtype=np.float64)
    return (total / len(stored)).astype(np.float32)


def with_new_tokens(loaded: LoadedConfig, *, tell: Teller) -> LoadedConfig:
    """The same configuration; where its tokenizer lacks tokens that are to be learned, the model is one that has them.

    Raises:
        FineTuneError: the backend or the adapter cannot learn them, or the model cannot have them.
    """
    config = loaded.config
    if not config.tokens.learned:
        return loaded
    if problems := new_token_problems(loaded):
        raise ConfigError(problems)
    location = locate_model(config.model.path, revision=config.model.revision)
    tokenizer = FileTokenizer(location.folder)
    _refuse_unfit(config, tokenizer)
    if ends := [token for token in config.tokens.learned if token in ENDS]:
        tell(f"llama.cpp, and so Ollama, ends an answer at {', '.join(ends)}, for the name: let no answer go on there")
    lacking = {
        token: token in config.tokens.add_special_tokens
        for token in config.tokens.learned
        if tokenizer.added_id(token) is None
    }
    there = [token for token in config.tokens.learned if token not in lacking]
    if there:
        tell(f"{len(there)} of the tokens to learn are in the tokenizer already: {', '.join(there)}")
    if not lacking:
        return loaded
    folder = cache_folder() / "new-tokens" / grown_name(location, lacking)
    if folder.exists():
        tell(f"{folder} has the new tokens already")
    else:
        tell(f"adding {len(lacking)} tokens to {location.name}, in {folder} (once; again only when the model changes)")
        add_tokens(location, tokenizer, lacking, folder, revision=config.model.revision)
    model = config.model.model_copy(update={"path": str(folder), "revision": None})
    return replace(loaded, config=config.model_copy(update={"model": model}))


def cache_folder() -> Path:
    """Where model folders are made."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "finetune"


def grown_name(location: ModelLocation, tokens: Mapping[str, bool]) -> str:
    """What the folder of a model with these tokens is called: another where the model or the tokens are others."""
    known = json.dumps([base_files(location), dict(tokens)], sort_keys=True)
    return f"{location.folder.name}-{hashlib.sha256(known.encode()).hexdigest()[:16]}"


def _refuse_unfit(config: TrainingConfig, tokenizer: FileTokenizer) -> None:
    """Refuse tokens that would change what other text becomes."""
    problems = []
    for key in ("add_special_tokens", "add_tokens"):
        for token in getattr(config.tokens, key):
            what = ""
            if tokenizer.added_id(token) is not None:
                continue
            if tokenizer.has_word(token):
                what = f"{token!r} is a word of the model's vocabulary"
            elif near := [each for each in tokenizer.added if each.strip() and (each in token or token in each)]:
                what = f"of {token!r} and {near[0]!r}, which the tokenizer has, one is part of the other"
            if what:
                problems.append(Problem(what, f"tokens.{key}", "choose another name, such as <|name|>"))
    if problems:
        raise ConfigError(problems)


def add_tokens(
    location: ModelLocation,
    tokenizer: FileTokenizer,
    tokens: Mapping[str, bool],
    output: Path,
    *,
    revision: str | None = None,
) -> None:
    """Write the model in a folder with more tokens, in their order; each is to be special or not.

    The folder says of which model it was made, a hub's by its `revision`.

    Raises:
        ModelError: its tables are no plain numbers, or cannot be told.
    """
    from tokenizers import AddedToken, Tokenizer

    grown = Tokenizer.from_str(json.dumps(tokenizer.description()))
    for token, special in tokens.items():
        grown.add_tokens([AddedToken(token, special=special, normalized=False)])
    ids = {token: int(grown.token_to_id(token)) for token in tokens}
    weights = WithTokens(location.folder, read_shape(location.folder), list(ids.values()))
    written = ModelFiles(weights, weights)
    make_folder(output.parent)
    check_space(output, written.total_bytes + _SIDE_BYTES, smaller="another XDG_CACHE_HOME")

    def fill(folder: Path) -> None:
        written.write(folder)
        if wrong := next(written.differences(Files(weight_files(folder))), ""):
            raise ExportError(f"the model with new tokens was not written as it is to be: {wrong}", hint="try again")
        for name in (*TOKENIZER_FILES, *_OTHERS):
            source = location.folder / name
            if source.exists():
                refuse_leading_out(source)
                (folder / name).write_bytes(source.read_bytes())
        (folder / "tokenizer.json").write_text(grown.to_str(pretty=True) + "\n", encoding="utf-8")
        _write_settings(folder, {ids[token]: (token, special) for token, special in tokens.items()})
        config = read_config(location.folder)
        holder = config["text_config"] if isinstance(config.get("text_config"), dict) else config
        holder["vocab_size"] = weights.rows
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        told = {"path": str(location.folder) if location.source == "local" else location.name, "revision": revision}
        if (location.folder / MADE_FROM).is_file():
            told["made_from"] = read_json(location.folder / MADE_FROM)
        write_json(folder / MADE_FROM, {**told, "tokens": dict(tokens)})

    write_folder(output, fill)


def _write_settings(folder: Path, added: Mapping[int, tuple[str, bool]]) -> None:
    """Tell of the tokens in those files beside `tokenizer.json` that list all that were added."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    if isinstance(settings.get("added_tokens_decoder"), dict):
        rules = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        for number, (token, special) in added.items():
            settings["added_tokens_decoder"][str(number)] = {"content": token, **rules, "special": special}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path = folder / "added_tokens.json"
    if path.exists():
        listed = read_json(path) | {token: number for number, (token, _) in added.items()}
        path.write_text(json.dumps(listed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
