"""Opens data files: regular ones only, unpacked where they are packed, as text in lines of a bounded length."""

import codecs
import gzip
import io
import os
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from finetune.errors import DataError, MissingExtraError, install_line
from finetune.files import meant_file
from finetune.reading import NotAFileError, open_regular

LONGEST_ROW = 2**26
"""A longer line, or row of a table, is refused before it is held: no model reads as much at once."""
MOST_UNPACKED, MOST_TIMES = 2**30, 100
"""What unpacks to more than this, and to more than so many times its size, is refused: rows do not shrink so far."""
MOST_FOR_NOTHING = 2**22
"""So many packed bytes on end that unpack to nothing are refused: bzip2's largest block needs a quarter of them."""
BLOCK = 2**20
"""Bytes of a text that is read in blocks."""
ROW_IN_MEMORY = 1024
"""What a row takes in memory beside its text, so that a file of a billion empty ones is large, too."""

_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
PACKED_SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """Open a data file as it is, in binary.

    Raises:
        DataError: it is missing, no regular file, or cannot be read.
    """
    try:
        with open_regular(path) as file:
            yield file
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, not a data file", hint="name the data file inside it") from None
    except NotAFileError as error:
        said = str(error.strerror).removeprefix("it is ")
        raise DataError(f"{path} is {said}", hint="write the rows to a file, and name that") from None
    except FileNotFoundError:
        hint = meant_file(path, "check the path (data.train or --data)")
        raise DataError(f"data file {path} does not exist", hint=hint) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise DataError(f"{path} cannot be read: {reason}", hint="check the path and its permissions") from None


@contextmanager
def _unpacked(path: Path) -> Iterator[tuple[BinaryIO, str, int]]:
    """The content of a data file, unpacked; by what it was packed, or ""; and how large the file is.

    The first bytes say how a file is packed: names are often wrong after a download.
    """
    with open_data(path) as file:
        start, size = file.read(8), os.fstat(file.fileno()).st_size
        file.seek(0)
        packing = next((name for magic, name in _PACKED.items() if start.startswith(magic)), "")
        if not packing:
            yield file, "", size
            return
        try:
            yield io.BufferedReader(_Unpacked(file, packing, path), 1 << 16), packing, size
        except Exception as error:
            # lzma has an error of its own, which not every Python can import.
            if not isinstance(error, EOFError | OSError | zlib.error) and type(error).__name__ != "LZMAError":
                raise
            raise DataError(
                f"{path} is a broken {packing} file: {error}", hint="make the file again, or download it again"
            ) from None


class _Packed(io.RawIOBase):
    """A packed file that counts what is read of it, and refuses to go on where all of that came to nothing."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.for_nothing = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self.for_nothing += len(block)
        if self.for_nothing > MOST_FOR_NOTHING:
            raise OSError(f"over {MOST_FOR_NOTHING:,} bytes of it on end unpack to nothing")
        return block


class _Unpacked(io.RawIOBase):
    """What is in a packed file, as it is unpacked."""

    def __init__(self, file: BinaryIO, packing: str, path: Path) -> None:
        super().__init__()
        self._packed = _Packed(file)
        self._stream = _opened(self._packed, packing, path)

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        block = self._stream.read(len(target))
        target[: len(block)] = block
        self._packed.for_nothing = 0
        return len(block)


def _opened(file: Any, packing: str, path: Path) -> Any:
    """What is in a packed file, as it is unpacked."""
    if packing == "gzip":
        return gzip.GzipFile(fileobj=file)
    # The rest is not in every Python.
    if packing == "bzip2":
        import bz2

        return bz2.BZ2File(file)
    if packing == "xz":
        import lzma

        return lzma.LZMAFile(file)
    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError(
            f"{path}: a zstd file needs pyarrow, which is not installed",
            hint=f"{install_line('parquet')}, or unpack it: zstd -d {shlex.quote(str(path))}",
        ) from None
    return pyarrow.CompressedInputStream(file, "zstd")


def _encoding(start: bytes) -> str:
    """The encoding of a text by its first bytes: by a byte order mark, or by the zeros in UTF-16."""
    if marked := next((name for mark, name in _MARKS.items() if start.startswith(mark)), ""):
        return marked
    # The first two characters of rows are ASCII: `{"`, `[\n`, a column's name.
    zeros = "".join("0" if not byte else "x" for byte in start)
    return {"x0x0": "utf-16-le", "0x0x": "utf-16-be"}.get(zeros, "utf-8")


def _recoded(stream: BinaryIO, encoding: str) -> Callable[[int], bytes]:
    """Reads a line of a text in another encoding, as UTF-8."""
    decoded = io.TextIOWrapper(stream, encoding, newline="")
    return lambda longest: decoded.readline(longest).encode("utf-8")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text with their numbers from 1 and their ends, which may be of any kind; unpacked and decoded.

    Raises:
        DataError: it cannot be read, is broken, holds what is no text, a line of over `LONGEST_ROW` bytes, or unpacks
            to more than `MOST_UNPACKED` bytes and a hundred times its size.
    """
    with _unpacked(path) as (stream, packing, size):
        encoding = _encoding(stream.peek(4)[:4])  # type: ignore[attr-defined]
        readline = stream.readline if encoding == "utf-8" else _recoded(stream, encoding)
        most = max(MOST_UNPACKED, MOST_TIMES * size) if packing else None
        number = offset = 0
        try:
            while raw := readline(LONGEST_ROW + 1):
                if len(raw) > LONGEST_ROW:
                    raise row_too_long(f"{path}:{number + 1}")
                text = raw.decode("utf-8")
                offset += len(raw)
                if most is not None and offset + ROW_IN_MEMORY * number > most:
                    raise _too_much(path, packing, size)
                if not number:
                    text = text.removeprefix("\ufeff")
                alone = "\r" in (text[:-2] if text.endswith("\r\n") else text)
                for line in _LINE.findall(text) if alone else [text]:
                    number += 1
                    yield number, line
        except UnicodeDecodeError as error:
            raise _not_text(path, encoding, offset, error, packing) from None


def text_blocks(path: Path, rows: Callable[[], int] = lambda: 0) -> Iterator[str]:
    """A text in blocks of up to `BLOCK` characters, unpacked and decoded; `rows` says how many were found so far.

    Raises:
        DataError: as `text_lines`, less that of a long line.
    """
    with _unpacked(path) as (stream, packing, size):
        encoding = _encoding(stream.peek(4)[:4])  # type: ignore[attr-defined]
        decoder = codecs.getincrementaldecoder(encoding)()
        offset = 0
        while True:
            block, first = stream.read(BLOCK), not offset
            try:
                text = decoder.decode(block, not block)
            except UnicodeDecodeError as error:
                kept = len(error.object) - len(block)  # of a character that the last block cut off
                raise _not_text(path, encoding, offset - kept, error, packing) from None
            offset += len(block)
            if packing and offset + ROW_IN_MEMORY * rows() > max(MOST_UNPACKED, MOST_TIMES * size):
                raise _too_much(path, packing, size)
            if not block:
                return
            yield text.removeprefix("\ufeff") if first else text


def whole_text(path: Path) -> str:
    """The whole of a text, unpacked and decoded.

    Raises:
        DataError: as `text_lines`, and it is longer than `LONGEST_ROW` bytes.
    """
    blocks, held = [], 0
    for block in text_blocks(path):
        blocks.append(block)
        held += len(block)
        if held > LONGEST_ROW:
            raise _too_whole(path)
    return "".join(blocks)


def _too_whole(path: Path) -> DataError:
    """The refusal of a long document, with the line that writes its rows to a file that is read line by line."""
    plain = path.with_suffix("") if path.suffix.lower() in PACKED_SUFFIXES else path
    say = (
        f"import json; d = json.load(open({str(plain)!r})); "
        "t = [[*v.values()] if isinstance(v, dict) else v for v in d.values()]; "
        "r = next((v for v in d.values() if isinstance(v, list) and isinstance(v[0], dict)), None); "
        "[print(json.dumps(each)) for each in r or (dict(zip(d, row)) for row in zip(*t))]"
    )
    how = f"python -c {shlex.quote(say)} > {shlex.quote(str(plain.with_suffix('.jsonl')))}"
    return DataError(
        f"{path} is longer than {LONGEST_ROW:,} bytes, and a .json file that is no list is read whole",
        hint=f"{'unpack it, and ' if plain != path else ''}write one row a line, for example with: {how}",
    )


def row_too_long(where: str) -> DataError:
    """The refusal of a row that no model reads."""
    return DataError(
        f"{where}: longer than {LONGEST_ROW:,} bytes, which is no row",
        hint="split it into several rows, or leave it out",
    )


def _too_much(path: Path, packing: str, size: int) -> DataError:
    how = {"gzip": "gzip -dk", "bzip2": "bzip2 -dk", "xz": "xz -dk", "zstd": "zstd -d"}[packing]
    return DataError(
        f"{path}: {size:,} bytes of {packing} unpack to rows of over {MOST_UNPACKED:,} bytes, over {MOST_TIMES} times "
        "as much: rows do not shrink so far",
        hint=f"if it is meant, unpack it and name what comes out: {how} {shlex.quote(str(path))}",
    )


def _not_text(path: Path, encoding: str, offset: int, error: UnicodeDecodeError, packing: str) -> DataError:
    name = {"utf-8": "UTF-8"}.get(encoding, encoding.upper())
    if encoding != "utf-8":
        return DataError(f"{path} is not {name}: {error.reason}", hint="save it again as UTF-8")
    place, byte = offset + error.start, error.object[error.start]
    if packing:
        hint = "unpack it first, and then convert it, for example with: iconv -f latin1 -t utf-8"
    else:
        better = path.with_name(f"{path.stem}.utf8{path.suffix}")
        hint = f"convert it, for example with: iconv -f latin1 -t utf-8 {shlex.quote(str(path))} > "
        hint += shlex.quote(str(better))
    return DataError(f"{path} is not UTF-8: byte {byte:#04x} at offset {place}", hint=hint)
