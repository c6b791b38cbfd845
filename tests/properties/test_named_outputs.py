"""Laws of outputs that are no ordinary file: what lies there is written into, and never replaced."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.errors import StorageError
from finetune.files import write_output, write_text
from finetune_strategies.profiles import examples

pytestmark = [pytest.mark.tools, pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")]

WRITE = "import sys; from pathlib import Path; from finetune.files import write_output; print('said'); "
WRITE += "write_output(Path(sys.argv[1]), 'page'); print('done')"


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=50), st.integers(0, 2), st.booleans())
@examples(20)
def test_link_stays_and_its_file_is_written(
    tmp_path_factory: pytest.TempPathFactory, text: str, links: int, there: bool
) -> None:
    """Through any number of links, to a file that is there or not."""
    folder = tmp_path_factory.mktemp("linked")
    path = folder / "file"
    if there:
        path.write_text("before")
    for number in range(links):
        (folder / f"link{number}").symlink_to(path.name)
        path = folder / f"link{number}"
    write_output(path, text)
    assert (folder / "file").read_bytes() == text.encode()
    assert sum(each.is_symlink() for each in folder.iterdir()) == links
    assert len(list(folder.iterdir())) == links + 1


def device(folder: Path, name: str, number: int) -> Path:
    """A device of the system's, or for somebody who could replace that, one of our own."""
    if os.geteuid() != 0:
        return Path("/dev", name)
    os.mknod(folder / name, stat.S_IFCHR | 0o666, os.makedev(1, number))
    return folder / name


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full, which Linux has")
def test_device_and_link_to_one_are_written_into(tmp_path: Path) -> None:
    """What takes everything takes it; one that is full is told as every full disk."""
    full, link = device(tmp_path, "full", 7), tmp_path / "link"
    link.symlink_to(device(tmp_path, "null", 3))
    write_output(link, "page")
    assert link.is_symlink()
    assert stat.S_ISCHR(link.stat().st_mode)
    with pytest.raises(StorageError, match="No space left"):
        write_output(full, "page")
    assert stat.S_ISCHR(full.stat().st_mode)


def test_pipe_is_written_into_if_somebody_reads(tmp_path: Path) -> None:
    """A reader gets the whole; where there is none, nobody is waited for."""
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    with pytest.raises(StorageError, match="pipe"):
        write_output(pipe, "page")
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(end, True)

    def drain() -> None:
        with open(end, "rb") as file:
            got.append(file.read())

    write_output(pipe, "first ")
    reader = threading.Thread(target=drain)
    reader.start()
    reader.join(timeout=20)
    assert got == [b"first "]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("kind", ["pipe", "file"])
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_own_output_is_an_output(tmp_path: Path, kind: str, name: str) -> None:
    """`/dev/stdout` goes where the rest goes, in its place among it, whatever that is."""
    if not os.path.exists(name):
        pytest.skip(f"this system has no {name}: Linux and macOS have")
    command, log = [sys.executable, "-c", WRITE, name], tmp_path / "log"
    if kind == "pipe":
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    else:
        with log.open("w") as file:
            subprocess.run(command, stdout=file, check=True, timeout=60)
        said = log.read_text()
    assert said == "said\npagedone\n"


def test_part_of_a_run_never_replaces_what_is_no_file(tmp_path: Path) -> None:
    """What a program writes for itself is refused where a pipe or a device lies, or a link to one."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "link"):
        with pytest.raises(StorageError, match="pipe, a device"):
            write_text(tmp_path / name, "page")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "pipe"]
    assert (tmp_path / "link").is_symlink()
