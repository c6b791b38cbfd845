"""Child processes of our own modules, their orderly end, and the memory that they held."""

import atexit
import contextlib
import gc
import json
import os
import runpy
import secrets
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from finetune.errors import EvidenceError


def python_command(*words: str) -> list[str]:
    """The command that runs this interpreter and imports nothing from the working folder.

    Without `-P` Python looks there first: a user's own `json.py` beside the data would be executed.
    """
    return [sys.executable, "-P", *words]


@contextlib.contextmanager
def tied_command(module: str, *words: str) -> Iterator[tuple[list[str], int]]:
    """The command that runs a module of ours and ends with this process, and the pipe that must be passed on to it."""
    heard, held = os.pipe()
    try:
        yield python_command("-m", __name__, str(heard), *words, module), heard
    finally:
        os.close(heard)
        os.close(held)


def ask_child(module: str, request: dict[str, Any], *, timeout: float = 600) -> dict[str, Any]:
    """Run `python -m module`, hand it `request` on standard input and return the object it prints last.

    Raises:
        EvidenceError: the child failed, took longer than `timeout` seconds or printed no answer; its last words are
            quoted.
    """
    try:
        with tied_command(module) as (command, pipe):
            asked = json.dumps(request)
            done = subprocess.run(
                command, input=asked, capture_output=True, text=True, timeout=timeout, pass_fds=(pipe,)
            )
    except subprocess.TimeoutExpired:
        raise EvidenceError(f"{module} took longer than {timeout:.0f} s and was stopped") from None
    if done.returncode != 0:
        words = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EvidenceError(f"{module} ended with code {done.returncode}: {words[:300]}")
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise EvidenceError(f"{module} printed no answer: {done.stdout[-200:]!r}") from None
    return answer


def end_with(pipe: int) -> None:
    """From now on this process ends, whatever it does, when nobody holds the other end of a pipe: its owner has ended.

    So nobody outlives a parent that was killed, which could not ask for it.
    """

    def watch() -> None:
        while os.read(pipe, 1):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


_TIE = "FT_TIED_TO"


@cache
def tie() -> dict[str, str]:
    """What to put into the environment of any program that is to end with this process, also where this is killed.

    A process of our own holds the other end of a pipe; when nobody writes to it any more, it ends all that is marked.
    """
    mark = secrets.token_hex(8)
    # Whoever ends those that are marked like us must leave it time to end ours.
    unmarked = {name: value for name, value in os.environ.items() if name != _TIE}
    watcher = subprocess.Popen(
        python_command("-c", "from finetune.processes import end_tied; end_tied()", mark),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env={**unmarked, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    )
    atexit.register(watcher.communicate)
    return {_TIE: mark}


def end_tied() -> None:
    """Be the process that ends all that is tied to the one that started it, when that has ended."""
    sys.stdin.read()
    while end_marked(_TIE, sys.argv[1]):  # what has been started meanwhile
        pass


def end_all(processes: Iterable[Any]) -> list[str]:
    """End these where they still run, and see that they are gone; their commands."""
    import psutil

    found, ended = [], []
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:200])
                process.kill()
                ended.append(process)
    psutil.wait_procs(ended, timeout=10)
    return found


def end_marked(name: str, mark: str) -> list[str]:
    """End every process that has this in its environment; what was still running, by its command."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(name) == mark:
                found.append(process)
    return end_all(found)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Within this context SIGTERM raises KeyboardInterrupt; outside the main thread, which has no signals, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def on_all_cores(work: Callable[[int], bytes], count: int) -> Iterator[bytes]:
    """What `work` says of each of so many parts, in their order, however many cores do it.

    On Linux children take the parts by turns: forked, they see all that this process holds, and start at once. A part
    of which a child says nothing, since it met an error or was killed, is done here: so an error is raised as it would
    be with one core. Elsewhere forking is not safe, and all is done here.
    """
    cores = min(count, usable_cores()) if sys.platform == "linux" else 1
    children: list[tuple[int, BinaryIO]] = []
    try:
        for number in range(cores if cores > 1 else 0):
            children.append(_forked(work, range(number, count, cores), [pipe for _, pipe in children]))
        for part in range(count):
            said = _heard(children[part % cores][1]) if children else None
            yield work(part) if said is None else said
    finally:
        for child, pipe in children:
            pipe.close()
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _forked(work: Callable[[int], bytes], parts: Iterable[int], others: Sequence[BinaryIO]) -> tuple[int, BinaryIO]:
    """A child that does these parts, and the pipe that it says them into."""
    heard, said = os.pipe()
    with _tokenizers_alone(), warnings.catch_warnings():
        # What threads of this process hold, such as a lock, a child could wait for without end: `work` must not.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        os.close(said)
        return child, open(heard, "rb")
    try:
        os.environ[_PARALLEL] = "false"
        gc.disable()
        # Where nobody reads any more, writing fails: so nobody outlives a parent that was killed.
        for pipe in (heard, *(each.fileno() for each in others)):
            os.close(pipe)
        with open(said, "wb") as told:
            for part in parts:
                content = work(part)
                told.write(len(content).to_bytes(8, "little") + content)
                told.flush()
    finally:
        os._exit(0)


_PARALLEL = "TOKENIZERS_PARALLELISM"


@contextlib.contextmanager
def _tokenizers_alone() -> Iterator[None]:
    """Within this context the tokenizer library, which has threads, does not warn of being forked."""
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = before or "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLEL]


def _heard(pipe: BinaryIO) -> bytes | None:
    """What a child says next; None where it says no more."""
    size = int.from_bytes(head, "little") if len(head := pipe.read(8)) == 8 else -1
    content = pipe.read(size) if size >= 0 else b""
    return content if len(content) == size else None


_STATUS = Path("/proc/self/status")
_CONTROL = Path("/proc/self/clear_refs")


def peak_rss() -> int | None:
    """The highest resident set of this process so far, in bytes; None where the system does not say.

    On Linux `getrusage` will not do: its figure begins with the peak of the process that started this one.
    """
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return _most_resident("RUSAGE_SELF")


def largest_child() -> int | None:
    """The highest resident set of any child, or child of a child, that has ended, in bytes; 0 without one.

    None where the system does not say. On Linux it is at least what this process held when it started the child:
    together with `peak_rss` the larger of both is right.
    """
    return _most_resident("RUSAGE_CHILDREN")


def _most_resident(whose: str) -> int | None:
    try:
        import resource
    except ImportError:
        return None
    peak: int = resource.getrusage(getattr(resource, whose)).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Bytes of memory that this process holds now."""
    return int(_process(os.getpid()).memory_info().rss)


def processor_seconds(number: int) -> float:
    """How long processors have worked for a process and those it started and saw end; 0 where it ended itself."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        times = psutil.Process(number).cpu_times()
        return float(times.user + times.system + times.children_user + times.children_system)
    return 0.0


@cache
def _process(number: int) -> Any:
    import psutil

    return psutil.Process(number)


def available_memory() -> int:
    """Bytes that could be used now without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def restart_peak() -> None:
    """Forget the peak so far (imports reach high); only Linux can."""
    if _CONTROL.exists():
        _CONTROL.write_text("5")


if __name__ == "__main__":
    _, number, *words, module = sys.argv
    end_with(int(number))
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
