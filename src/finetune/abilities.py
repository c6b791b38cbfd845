"""What each backend needs and can do, known without importing a framework."""

from importlib.util import find_spec

from finetune.errors import MissingExtraError, UsageError

_NEEDS: dict[str, tuple[str, ...]] = {
    "torch": ("torch", "transformers", "peft"),
    "mlx": ("mlx", "mlx_lm"),
    "reference": (),
}
"""The libraries that each backend needs beyond those that are always installed."""


def require_backend(name: str) -> None:
    """Refuse a backend that cannot be opened here; nothing is imported.

    Raises:
        MissingExtraError: its libraries are not installed; the extra to install is named.
        UsageError: this version has no such backend.
    """
    if name not in _NEEDS:
        raise UsageError(f"backend {name!r} is not in this version", hint=f"choose one of: {', '.join(_NEEDS)}")
    missing = [library for library in _NEEDS[name] if find_spec(library) is None]
    if missing:
        raise MissingExtraError(
            f"backend {name!r} needs {', '.join(missing)}, which is not installed",
            hint=f"pip install 'finetune-suite[{name}]'",
        )
