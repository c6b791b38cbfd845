"""A trainer as laws see it: its answers are values, its files are arrays, and what they need is made for them once."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from finetune.verify.models import build_model
from finetune.verify.subjects.answers import ANSWERS, Reply
from finetune.verify.subjects.subject import RefusesError, Subject, SubjectError, UnsupportedError
from finetune_strategies.recipes import ModelRecipe

Tensors = Mapping[str, NDArray[Any]]
A = TypeVar("A", bound=Reply)


class SubjectClient:
    """A subject, and a scratch folder for what goes through it.

    Args:
        scratch: below it everything is made; it exists, and goes with the suite.
        oracle: the subject to our trainer in float64, by which laws compute what has to come out.
    """

    def __init__(self, subject: Subject, scratch: Path, oracle: Subject | None = None) -> None:
        self.subject = subject
        self.scratch = scratch
        self.oracle = self if oracle is None else SubjectClient(oracle, scratch)
        self._models: dict[str, Path] = {}
        self._words: dict[Path, Mapping[int, bytes]] = {}

    def lacks(self, *abilities: str) -> str:
        """Which of these abilities are missing, and why; empty where none is."""
        return self.subject.about.lacks(abilities)

    def ask(self, ability: str, kind: type[A], **given: object) -> A:
        """One answer.

        Raises:
            RefusesError: the trainer refuses, in its own words.
            UnsupportedError: it has nothing of the kind.
            SubjectError: it hung, ended, or answered with what is no answer.
        """
        assert ANSWERS.get(ability, kind) is kind
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
        try:
            answer = self.subject.ask(ability, plain)
        except (RefusesError, UnsupportedError, SubjectError):
            raise
        # A subject of the user's own may raise anything, which is its trouble and not the suite's.
        except Exception as error:
            raise SubjectError(f"asked to {ability} its subject raised {type(error).__name__}: {error}") from error
        try:
            return kind.model_validate(answer)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:4])
            raise SubjectError(f"asked to {ability} it gave no such answer: {wrong}") from None

    def model(self, recipe: ModelRecipe) -> Path:
        """The folder of a model that is made once for all laws."""
        key = recipe.model_dump_json()
        if key not in self._models:
            folder = self.folder() / "model"
            build_model(recipe, folder)
            self._models[key] = folder
        return self._models[key]

    def folder(self) -> Path:
        """A new empty folder."""
        return Path(tempfile.mkdtemp(dir=self.scratch))

    def keep(self, tensors: Tensors) -> Path:
        """A new file with these tensors."""
        path = self.folder() / "tensors.safetensors"
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path)
        return path

    def tensors(self, file: str | Path) -> Tensors:
        """What a file holds that the trainer named.

        Raises:
            SubjectError: there is no such file.
        """
        try:
            found: Tensors = load_file(file)
        except (OSError, SafetensorError, ValueError) as error:
            raise SubjectError(f"the file that it named cannot be read: {file}: {error}") from None
        return found

    def words(self, model: Path) -> Mapping[int, bytes]:
        """The bytes of each token of a model that was made here; those of control tokens are their names'."""
        if model not in self._words:
            tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
            letters = {letter: byte for byte, letter in byte_letters().items()}
            known = tokenizer["model"]["vocab"].items()
            self._words[model] = {number: bytes(letters[letter] for letter in word) for word, number in known}
        return self._words[model]


def byte_letters() -> Mapping[int, str]:
    """The letter that byte-level tokenizers write for each byte.

    Source: `bytes_to_unicode` of GPT-2's `encoder.py`.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}
