"""Words that may be shown: no control character acts, no letter hides another, and no secret is told."""

import os
import re
from collections.abc import Mapping

_SECRET_NAME = re.compile(r"(?i)(token|secret|passw|api_?key|credential)")
_LOGIN = re.compile(r"(\w\w:/{1,2})[^\s/@'\"]+@")  # of an address that was taken for a path one slash is left
_ASKED = re.compile(r"(?i)([?&](?:[\w.-]*(?:token|secret|passw|key|sig)[\w.-]*)=)[^\s&#'\"]+")
_SHORTEST = 8

_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_PICTURES = {
    **{code: 0x2400 + code for code in range(32) if code not in (9, 10)},
    # DEL has a picture of its own; the C1 controls have none, and some terminals obey them.
    127: 0x2421,
    **dict.fromkeys(range(128, 160), 0xFFFD),
}


def visible(text: str) -> str:
    """The text with control characters as pictures (NUL as U+2400): a page cannot carry them and may not hide them."""
    # A lone surrogate is legal in JSON and illegal in UTF-8: without this the page could not be written at all.
    return text.translate(_PICTURES).encode("utf-8", "replace").decode("utf-8")


def in_a_line(text: str) -> str:
    """The text as `visible`, without what turns the order of letters round, so that a name looks like another."""
    return visible(text.translate(dict.fromkeys(_BIDI, 0xFFFD)))


def without_secrets(text: str, environ: Mapping[str, str] | None = None) -> str:
    """The text without logins in addresses, keys that are asked with, and values of the environment that are secret."""
    text = _ASKED.sub(r"\1***", _LOGIN.sub(r"\1***@", text))
    for name, value in (os.environ if environ is None else environ).items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST:
            text = text.replace(value, "***")
    return text
