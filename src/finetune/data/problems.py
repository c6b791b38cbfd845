"""Tells every problem of a data file at once."""

from finetune.errors import DataError


def raise_all(problems: list[str], *, hint: str) -> None:
    """Raise one DataError that names every problem (twenty in full, the rest counted); nothing when there is none."""
    if not problems:
        return
    shown = problems[:20]
    if len(problems) > len(shown):
        shown.append(f"... and {len(problems) - len(shown)} more")
    raise DataError("\n  ".join(["the data cannot be used:", *shown]), hint=hint)
