"""A fork server: starts programs in real processes within milliseconds, each forked from one that has only imported.

Such a process has its own memory, dies by real signals, and takes nobody along.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from finetune.errors import EvidenceError
from finetune.processes import python_command, tie
from finetune.verify.stateful.deaths import CrashInjector, Death
from finetune.verify.stateful.lives import Ending

_PATIENCE = 300
"""Seconds after which a process that does not end is ended, by SIGALRM."""


class ForkServer:
    """A process that has imported some modules, and forks another one of itself for each program.

    Args:
        modules: what is imported once instead of by each program.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            python_command("-m", "finetune.verify.stateful.fork_server", *modules),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # What can be imported here, a subject's own programs for example, can be imported there.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **tie()},
            # Ctrl-C is for whoever runs the suite, and comes to us when our input is closed.
            start_new_session=True,
        )

    def run(self, program: str, arguments: Sequence[str], folder: Path, death: Death | None) -> Ending:
        """Run a program, with these arguments, until it ends.

        Args:
            program: the function that a process of its own would call, as `module:function`.
            folder: the changes in here are counted, and at one of them it dies as it is to.

        Raises:
            EvidenceError: the fork server itself has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        child = {"program": program, "arguments": list(arguments), "folder": str(folder.absolute())}
        request = {**child, "death": asdict(death) if death else None}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return Ending(**json.loads(self._process.stdout.readline()))
        except (OSError, ValueError) as error:
            raise EvidenceError(f"the process that starts {program} has ended: {error}") from None

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def _serve(modules: Sequence[str]) -> None:
    for module in modules:
        import_module(module)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_fork(json.loads(line))) + "\n")
        sys.stdout.flush()


def _fork(request: dict[str, object]) -> dict[str, Any]:
    """Fork a process for the request; how it ended."""
    ends = {name: os.pipe() for name in ("answer", "stderr", "changes")}
    child = os.fork()
    if child == 0:
        _run_child(request, {name: end for name, (_, end) in ends.items()})
    for _, end in ends.values():
        os.close(end)
    with ThreadPoolExecutor(1) as waiting:
        ended = waiting.submit(_await_end, child)
        heard = _listen({end: name for name, (end, _) in ends.items()})
    code = os.waitstatus_to_exitcode(ended.result())
    changes = heard.pop("changes")
    words = {name: text.decode(errors="replace") for name, text in heard.items()}
    return {"code": code, **words, "changes": int(changes) if changes else None}


def _await_end(child: int) -> int:
    """How a process ended; what it had started goes with it, and holds none of its pipes open."""
    status = os.waitpid(child, 0)[1]
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    return status


def _listen(ends: dict[int, str]) -> dict[str, bytes]:
    heard = dict.fromkeys(ends.values(), b"")
    with selectors.DefaultSelector() as ready:
        for end in ends:
            ready.register(end, selectors.EVENT_READ)
        while ready.get_map():
            for key, _ in ready.select():
                block = os.read(key.fd, 1 << 16)
                heard[ends[key.fd]] += block
                if not block:
                    ready.unregister(key.fd)
                    os.close(key.fd)
    return heard


def _run_child(request: dict[str, Any], ends: dict[str, int]) -> None:
    """Be the program; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        for number, end in enumerate([os.open(os.devnull, os.O_RDONLY), ends["answer"], ends["stderr"]]):
            os.dup2(end, number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(_PATIENCE)
        death = request["death"]
        watch = CrashInjector(Path(request["folder"]), Death(**death) if death else None)
        os.fsync = watch.flush
        sys.argv = [request["program"], *request["arguments"]]
        sys.addaudithook(watch)
        code = _run(request["program"])
        sys.stdout.flush()
        os.write(ends["changes"], str(watch.changes).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _run(program: str) -> int:
    module, _, function = program.partition(":")
    try:
        getattr(import_module(module), function)()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1:])
