"""A trainer to judge by its name: ours, another project's in its own environment, or one of the user's own."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from urllib.parse import quote

from finetune.abilities import require_backend
from finetune.errors import MissingExtraError, UsageError
from finetune.processes import python_command
from finetune.verify.subjects.command import CommandSubject
from finetune.verify.subjects.command_file import load_command
from finetune.verify.subjects.process import SubprocessSubject
from finetune.verify.subjects.subject import About, Subject

BACKENDS = ("reference", "torch", "mlx")
"""Our own trainer goes by the name of its backend."""
PYTHON_VARIABLE = "FT_SUBJECT_PYTHON"
"""The environment variable that names the interpreter of another project's environment."""
_VERIFY = Path(__file__).resolve().parents[1]
_MISSING = (
    "import sys; from importlib.util import find_spec; "
    "print(*(name for name in sys.argv[1:] if find_spec(name) is None))"
)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another project's trainer: the program that answers for it, what that imports, and how to get it."""

    script: str
    needs: tuple[str, ...]
    install: str


PEERS: Mapping[str, Peer] = {
    "trl": Peer("trl_sft.py", ("torch", "transformers", "peft", "datasets", "trl"), "torch trl peft"),
    "trainer": Peer("plain_trainer.py", ("torch", "transformers", "peft"), "torch transformers peft accelerate"),
    "mlx-lm": Peer("mlx_lm_lora.py", ("mlx", "mlx_lm"), "mlx-lm 'mlx[cpu]; platform_system == \"Linux\"'"),
}
"""Each trainer of others' by its name: `trainer` is transformers' `Trainer` with PEFT, as its users write it."""


def is_shipped(name: str) -> bool:
    """Whether a name means a trainer that comes with the suite."""
    return name in BACKENDS or name in PEERS


def subject_file(name: str) -> str:
    """The file that stands for a subject, as a reference relative to the repository in which we are.

    What is installed elsewhere is named as it is imported, by its file in the repository where there is one.
    """
    here = Path.cwd().resolve()
    root = next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), here)
    module, colon, _ = name.partition(":")
    if name.endswith(".toml"):
        path, imported = Path(name).resolve(), Path(Path(name).name)
    elif colon:
        imported = Path(f"{module.replace('.', '/')}.py")
        path = Path(getattr(sys.modules.get(module), "__file__", None) or imported).resolve()
        imported = imported.with_suffix("") / path.name if path.name == "__init__.py" else imported
    else:
        path = _VERIFY / "trainers" / (PEERS[name].script if name in PEERS else "ours.py")
        imported = path.relative_to(_VERIFY.parents[1])
    own = next((each for each in (imported, "src" / imported) if (root / each).is_file()), imported)
    if path.is_relative_to(root) and "site-packages" not in path.parts:
        own = path.relative_to(root)
    return quote(own.as_posix())


@contextmanager
def running_subject(name: str, scratch: Path, *, python: str | None = None) -> Iterator[Subject]:
    """A trainer, closed in the end with all that it started.

    Args:
        name: `reference`, `torch` or `mlx` (ours, by its backend), a name of `PEERS`, the path of a TOML file that
            says which command to call, or `module:Class` of a subject of the user's own, which is called without
            arguments.
        scratch: a folder that exists; the trainer's process lives in a new one below it.
        python: the interpreter of a peer's environment. Default: the environment variable `FT_SUBJECT_PYTHON`, or else
            this interpreter where it has what is needed.

    Raises:
        UsageError: there is no such trainer, no such interpreter, or what is wrong in the file.
        MissingExtraError: what it needs is not installed.
        SubjectError: it did not start.
    """
    subject = _made(name, Path(tempfile.mkdtemp(dir=scratch)), python)
    try:
        yield subject
    finally:
        subject.close()


def _made(name: str, folder: Path, python: str | None) -> Subject:
    if python and name not in PEERS and not name.endswith(".toml"):
        raise UsageError(
            f"--python {python}: {name!r} is asked by this very interpreter",
            hint=f"leave --python out; it is for {', '.join(PEERS)} and TOML files",
        )
    if name in BACKENDS:
        require_backend(name)
        return SubprocessSubject(python_command("-m", "finetune.verify.trainers.ours", name), folder)
    if name in PEERS:
        return _peer(name, folder, _interpreter(python))
    if name.endswith(".toml"):
        return CommandSubject(load_command(Path(name)), folder, python=_interpreter(python))
    module, colon, maker = name.partition(":")
    if colon and module and maker:
        return _own(module, maker)
    raise UsageError(f"there is no subject {name!r}", hint=_hint())


def _interpreter(named: str | None) -> str:
    """The interpreter that is named, in a way that holds in any folder; a link to one stays a link."""
    chosen = named or os.environ.get(PYTHON_VARIABLE) or sys.executable
    return os.path.abspath(chosen) if os.sep in chosen else chosen


def _peer(name: str, folder: Path, python: str) -> SubprocessSubject:
    """Another project's trainer; our own code cannot be imported there."""
    peer = PEERS[name]
    # Our programs find each other by their folder, which a safe path leaves out: it is named.
    places = os.pathsep.join(str(_VERIFY / room) for room in ("subjects", "trainers"))
    environment = {"PYTHONPATH": places, "PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1"}
    if missing := _missing(python, peer.needs):
        hint = (
            f"make it an environment of its own: python -m venv {name}-env && {name}-env/bin/pip install "
            f"{peer.install}; then say --python {name}-env/bin/python, or set {PYTHON_VARIABLE}"
        )
        raise MissingExtraError(f"subject {name!r} needs {missing}, which is not installed for {python}", hint=hint)
    return SubprocessSubject([python, str(_VERIFY / "trainers" / peer.script)], folder, environment=environment)


def _missing(interpreter: str, needs: tuple[str, ...]) -> str:
    """Which of these an interpreter cannot import.

    Raises:
        UsageError: it is no interpreter that runs.
    """
    # Isolated, as nothing of the user's own environment or working folder counts there; Python 3.9 has no -P.
    command = [interpreter, "-I", "-c", _MISSING, *needs]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        hint = "name the python program of an environment, such as trl-env/bin/python"
        raise UsageError(f"{interpreter} is no Python interpreter that runs: {error}", hint=hint) from None
    return ", ".join(done.stdout.split())


def _own(module: str, maker: str) -> Subject:
    name = f"{module}:{maker}"
    # What lies here can be imported, but takes no other module's name.
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        subject: Subject = getattr(import_module(module), maker)()
    # Whatever a class of the user's own does when it is made, it is no subject then.
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"the subject {name!r} cannot be made: {why}", hint=_hint()) from None
    lacks = [part for part in ("ask", "close") if not callable(getattr(subject, part, None))]
    if lacks or not isinstance(getattr(subject, "about", None), About):
        raise UsageError(
            f"{name!r} is no subject: it has no {lacks[0] if lacks else 'about'}",
            hint="a subject has `about` (an About), `ask(ability, given)` and `close()`",
        )
    return subject


def _hint() -> str:
    return f"choose one of: {', '.join((*BACKENDS, *PEERS))}; or write the path of a .toml file, or module:Class"
