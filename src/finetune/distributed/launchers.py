"""The command lines of the launchers: torchrun, accelerate and mlx.launch, each as its maker wrote it."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from finetune.config.yaml_file import yaml_values
from finetune.distributed.environment import LAUNCHERS, NOTES, started_by
from finetune.errors import MissingExtraError, RefusedError, UsageError, install_line
from finetune.processes import python_command
from finetune.reading import read_text

_STARTED: dict[str, tuple[str | int, ...]] = {
    "distributed_type": ("MULTI_GPU", "FSDP"),
    "num_machines": (1,),
    "gpu_ids": ("all",),
}
"""What a file of accelerate's may ask for: the values that start as many processes as it says, here."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How the processes of a run are started; `config` is a file of accelerate's own."""

    launcher: str
    processes: int
    config: Path | None = None

    @property
    def options(self) -> str:
        """The options of `ft train` that ask for it."""
        file = f" --launch-config {self.config}" if self.config else ""
        return f"--launch {self.launcher} --processes {self.processes}{file}"


def plan_launch(launcher: str | None, processes: int | None, config: Path | None, *, planned: int | None) -> Launch:
    """What was asked for, in numbers; `planned` is `training.processes`.

    Raises:
        UsageError: the options do not go together, or nothing says how many processes to start.
        RefusedError: the file asks accelerate for something that it does not start.
    """
    if launcher is None:
        given = "--processes" if processes is not None else "--launch-config"
        raise UsageError(f"{given} needs a launcher", hint=f"add --launch with one of: {', '.join(LAUNCHERS)}")
    if launcher not in LAUNCHERS:
        raise UsageError(f"there is no launcher {launcher!r}", hint=f"choose one of: {', '.join(LAUNCHERS)}")
    if config is not None and launcher != "accelerate":
        raise UsageError(f"--launch-config is a file of accelerate's, and {launcher} does not read it")
    configured = _processes_in(config) if config else None
    number = processes or planned or configured
    if number is None:
        raise UsageError("--launch does not say how many processes to start", hint="add --processes, such as 2")
    if number == 1:
        raise UsageError("one process needs no launcher", hint="leave out --launch, or ask for more with --processes")
    return Launch(launcher, number, config)


def _processes_in(config: Path) -> int | None:
    """How many processes a file of accelerate's asks for; None where it does not say."""
    try:
        value = yaml_values(read_text(config))
    except (OSError, ValueError) as error:
        what = f"--launch-config {config} cannot be read: {str(error).splitlines()[0]}"
        raise UsageError(what, hint="`accelerate config` writes one") from None
    settings = value if isinstance(value, dict) else {}
    if settings.get("use_cpu") or settings.get("distributed_type") == "MULTI_CPU":
        raise RefusedError(
            f"accelerate starts what {config} asks for, training on processors, through mpirun only",
            hint="set distributed_type to MULTI_GPU and use_cpu to false: FineTune computes on processors all the same",
        )
    for key, able in _STARTED.items():
        if settings.get(key, able[0]) not in able:
            raise RefusedError(
                f"{config} asks accelerate for {key} {settings[key]!r}; runs of several processes are on this "
                "machine's processors",
                hint=f"set {key} to {' or '.join(map(str, able))} there",
            )
    number = settings.get("num_processes")
    return number if isinstance(number, int) and number > 0 else None


def check_launch(launch: Launch, backend: str, environ: Mapping[str, str]) -> None:
    """Refuse, before anything is started, what cannot work.

    Raises:
        UsageError: this process was started by a launcher itself.
        RefusedError: the backend does not understand the launcher.
        MissingExtraError: the launcher is not installed.
    """
    if NOTES in environ or started_by(environ):
        launcher = started_by(environ) or "ft train --launch"
        raise UsageError(f"--launch inside a process that {launcher} has started", hint="leave out one of the two")
    room, library = LAUNCHERS[launch.launcher]
    if backend != room:
        able = [name for name, (other, _) in LAUNCHERS.items() if other == backend]
        raise RefusedError(
            f"the backend {backend!r} does not understand {launch.launcher}",
            hint=f"use --launch {' or '.join(able)}" if able else "it trains in one process: leave out --launch",
        )
    if find_spec(library) is None:
        raise MissingExtraError(f"{launch.launcher} needs {library}, which is not installed", hint=install_line(room))


def command_line(launch: Launch, arguments: Sequence[str]) -> list[str]:
    """The words that start `ft` with these arguments in every process."""
    worker, number = list(arguments), str(launch.processes)
    if launch.launcher == "torchrun":
        return python_command("-m", "torch.distributed.run", "--nproc-per-node", number, "--standalone", "-m", *worker)
    if launch.launcher == "accelerate":
        # MULTI_GPU is accelerate's name for one process per worker; MULTI_CPU would need mpirun. Neither needs a GPU.
        plain = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        options = ["--config_file", str(launch.config)] if launch.config else plain
        own = ["--num_processes", number, "--main_process_port", "0", "--module"]
        return python_command("-m", "accelerate.commands.launch", *options, *own, *worker)
    where = ["-n", number, "--backend", "ring", "--starting-port", str(_free_ports(launch.processes))]
    return python_command("-c", _entry("mlx.launch"), *where, "--", *python_command("-m", *worker))


def environment(launch: Launch, environ: Mapping[str, str], notes: Path) -> dict[str, str]:
    """What the processes find in their environment: where to leave notes, and their share of the cores.

    A launcher starts Python itself; PYTHONSAFEPATH keeps what lies in the working folder from being imported there.
    """
    cores = max(1, (os.cpu_count() or 1) // launch.processes)
    return {"OMP_NUM_THREADS": str(cores), **environ, NOTES: str(notes), "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}


def _entry(name: str) -> str:
    """The Python words that do what the installed program `name` does."""
    found: list[EntryPoint] = list(entry_points(group="console_scripts", name=name))
    if not found:
        raise MissingExtraError(f"{name} is not installed", hint=install_line("mlx"))
    return f"from {found[0].module} import {found[0].attr}; {found[0].attr}()"


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring free ports."""
    for _ in range(100):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first: int = probe.getsockname()[1]
        if first + count < 2**16 and all(_is_free(first + number) for number in range(count)):
            return first
    raise RefusedError("no free ports were found for the processes to meet at")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
