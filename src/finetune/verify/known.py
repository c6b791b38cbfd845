"""A baseline: what did not hold when a verification was kept, so that only what is new fails."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UsageError
from finetune.reading import read_json
from finetune.verify.run import BAD, FORMAT, VERSION

_HINT = "a baseline is what `ft verify --json` prints, or verification.json in the folder of --output"
_MOST_BYTES = 50_000_000


@dataclass(frozen=True, slots=True)
class KnownFindings:
    """Of whom something was known, and the outcome of each law that did not hold."""

    subject: str
    outcomes: Mapping[str, str]


def read_known(path: Path) -> KnownFindings:
    """The baseline in a file.

    Raises:
        UsageError: it cannot be read, or is no verification of ours.
    """
    try:
        values = read_json(path, _MOST_BYTES)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint=_HINT) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no baseline: {error}", hint=_HINT) from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UsageError(f"{path} is no baseline: it is not of the format {FORMAT!r}", hint=_HINT)
    if values.get("version") != VERSION:
        found = values.get("version")
        raise UsageError(f"{path} is of version {found!r}; this program reads version {VERSION}", hint=_HINT)
    laws = values.get("laws")
    if not isinstance(laws, list) or not all(_is_judged(each) for each in laws):
        raise UsageError(f"{path} is no baseline: `laws` must be a list of laws with their outcomes", hint=_HINT)
    return KnownFindings(
        str(values.get("subject")), {each["law"]: each["outcome"] for each in laws if each["outcome"] in BAD}
    )


def _is_judged(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("law"), str) and isinstance(value.get("outcome"), str)
