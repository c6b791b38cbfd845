"""Reads `config.json` with care: names what is missing or of the wrong kind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.errors import ModelError


@dataclass(frozen=True, slots=True)
class Settings:
    """What `config.json` says."""

    config: Mapping[str, Any]

    def get(self, key: str, default: object = None) -> Any:
        """A setting as it stands in the file."""
        return self.config.get(key, default)

    def whole(self, *keys: str, default: int | None = None) -> int:
        """The first of these settings that is said: a whole number above 0.

        Raises:
            ModelError: none is said and there is no default, or it is something else.
        """
        value = self._first_of(keys, default)
        if type(value) is not int or value <= 0:
            raise ModelError(f"config.json: {keys[0]} is {value!r}, not a whole number above 0", hint=_AGAIN)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A setting that is a number.

        Raises:
            ModelError: as `whole`.
        """
        value = self._first_of((key,), default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"config.json: {key} is {value!r}, not a number", hint=_AGAIN)
        return float(value)

    def require(self, key: str, value: object, allowed: Sequence[object]) -> None:
        """Refuse a value that llama.cpp does not compute.

        Raises:
            ModelError: it is none of those allowed.
        """
        if value not in allowed:
            raise ModelError(
                f"config.json: {key} is {value!r}, and llama.cpp computes "
                f"{self.config.get('model_type')} with {' or '.join(map(repr, allowed))} only",
                hint="this model cannot be written as GGUF",
            )

    def _first_of(self, keys: Sequence[str], default: float | None) -> Any:
        found = [self.config[key] for key in keys if self.config.get(key) is not None]
        if not found and default is None:
            raise ModelError(f"config.json does not say {' or '.join(keys)}", hint=_AGAIN)
        return found[0] if found else default


_AGAIN = "get the model again"
