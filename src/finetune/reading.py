"""Opens what is read: regular files alone, no more of one than it can need, and JSON whose values can be used.

Whatever is wrong is an OSError or a ValueError, which the reader of each kind of file tells in its own words.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 2**26
"""Far above what a file of settings, a template or a list of weights can need; what may be longer says so itself."""
_BLOCK = 2**16
_LONGEST_NUMBER = 300
"""Digits of a whole number that is still one as a float."""


class NotAFileError(OSError):
    """A pipe, a device or a socket: it may be waited for without end, or never end."""


def check_regular(path: Path) -> int:
    """Make sure that a path leads to a regular file, before a library opens it, and say how large it is.

    Raises:
        OSError: there is nothing, or something else; ValueError: no file can have that name.
    """
    found = os.stat(path)
    _check_mode(path, found.st_mode)
    return found.st_size


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file in binary.

    Raises:
        OSError, ValueError: as `check_regular`, or it cannot be read.
    """
    check_regular(path)  # a device may act when it is opened
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_mode(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        OSError, ValueError: as `open_regular`, or it has more than `most` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(size + 1)  # Python takes the memory for all that is asked for
        # It has grown since, or is one of those whose size is only known once they are read, as in /proc.
        while size < len(content) <= most and (more := file.read(_BLOCK)):
            content += more
    if (found := max(size, len(content))) > most:
        raise OSError(errno.EFBIG, f"it has {found:,} bytes, and {most:,} are the most that are read", str(path))
    return content


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The content of a regular file as UTF-8, its line ends as Python has them.

    Raises:
        OSError, ValueError: as `read_bytes`, or it is not UTF-8.
    """
    return read_bytes(path, most).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """The value in a JSON file.

    Raises:
        OSError, ValueError: as `read_text`, or it is no JSON, nested too deep, or holds a number that no float reaches.
    """
    try:
        return json.loads(read_text(path, most), parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _whole(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits):,} digits is none that can be meant")
    return int(digits)


def _check_mode(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        raise NotAFileError(errno.EINVAL, "it is a pipe, a device or a socket, not a file", str(path))
