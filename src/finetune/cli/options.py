"""The options that several verbs share, and the configuration they add up to."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from finetune.errors import ConfigError, MissingExtraError, Problem, UsageError, install_line

if TYPE_CHECKING:
    from finetune.config import LoadedConfig
    from finetune.export.model_files import Dtype
    from finetune.export.outtypes import Outtype
    from finetune.training.longer import Longer

ConfigFile = Annotated[Path | None, typer.Argument(metavar="CONFIG", help="A YAML file; `ft init` writes one.")]
ConfigFiles = Annotated[list[Path] | None, typer.Argument(metavar="CONFIG", help="YAML files; `ft init` writes one.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print every verdict, figure, note and file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def with_base(run: Path) -> Path:
    """A run whose base is there: one that was made in the cache and is gone is made again."""
    from finetune.cli.console import say
    from finetune.export import cached

    return cached.with_base(run, tell=say)


def _named_run(name: str) -> Path:
    from finetune.run.find import find_run

    return with_base(find_run(name))


RunPath = Annotated[
    Path,
    typer.Argument(metavar="RUN", parser=_named_run, help="A run: its path, its id or how that begins, or latest."),
]

SHORT_OPTIONS = {
    "epochs": "training.epochs",
    "lr": "training.learning_rate",
    "batch_size": "training.batch_size",
    "rank": "adapter.rank",
    "max_steps": "training.max_steps",
}
"""Options that trainers have in common, and the settings that they are."""


_NAMED = {"model": "model.path", "data": "data.train", "template": "template.name", "backend": "backend"}
"""Options whose text is a setting's value as it stands."""


def _as_typed(problem: Problem, assigned: Mapping[str, object]) -> Problem:
    """A problem of a setting that an option of its own has set, told of that option."""
    for option, key in (_NAMED | SHORT_OPTIONS).items():
        if problem.where == f"--set {key}" and key not in assigned:
            written = f"--{option.replace('_', '-')}"
            return replace(problem, where=written if key == option else f"{written} ({key})")
    return problem


class ConfigOptions(NamedTuple):
    """The options of a configuration, as the user gave them."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Shipped name, folder, GGUF file or hub id; or a run or an adapter to go on from."
        ),
    ] = None
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Training rows: a file, folder, pattern or hub set; several times for several."),
    ] = None
    template: Annotated[
        str | None, typer.Option("--template", help="auto, tokenizer, alpaca, chatml, llama2, llama3 or a .jinja file.")
    ] = None
    backend: Annotated[str | None, typer.Option("--backend", help="torch, mlx or reference.")] = None
    epochs: Annotated[str | None, typer.Option("--epochs", metavar="N", help="training.epochs")] = None
    lr: Annotated[str | None, typer.Option("--lr", metavar="X", help="training.learning_rate")] = None
    batch_size: Annotated[str | None, typer.Option("--batch-size", metavar="N", help="training.batch_size")] = None
    rank: Annotated[str | None, typer.Option("--rank", metavar="N", help="adapter.rank")] = None
    max_steps: Annotated[str | None, typer.Option("--max-steps", "--steps", metavar="N", help="training.max_steps")] = (
        None
    )
    profile: Annotated[str | None, typer.Option("--profile", help="chat, instruction, code or demo.")] = None
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, such as training.seed=1.")
    ] = None

    def load(self, config: Path | None) -> "LoadedConfig":
        """The configuration that file, environment and options add up to.

        Without data of one's own the shipped data is trained on, and then the `demo` profile fits unless another is
        asked for.
        """
        from finetune.cli.console import say
        from finetune.config import load_config, parse_assignments
        from finetune.evidence.starting import with_start
        from finetune.export.cached import with_model_folder

        given = {name: value for name, value in self._asdict().items() if value is not None}
        if len(sources := given.pop("data", [])):
            given["data"] = sources if len(sources) > 1 else sources[0]
        overrides: dict[str, Any] = {key: given[name] for name, key in _NAMED.items() if name in given}
        short = [f"{key}={given[name]}" for name, key in SHORT_OPTIONS.items() if name in given]
        assigned = parse_assignments(self.assignments or [])
        overrides |= parse_assignments(short) | assigned
        try:
            loaded = load_config(config, environ=os.environ, overrides=overrides, profile=self.profile)
        except ConfigError as error:
            raise ConfigError([_as_typed(problem, assigned) for problem in error.problems]) from None
        if loaded.config.data.train is None and "profile" not in loaded.origins.values():
            loaded = load_config(config, environ=os.environ, overrides=overrides, profile="demo")
        return with_model_folder(with_start(loaded), tell=say)

    def longer(self) -> "Longer | None":
        """How long a resumed run is to be from now on; None where nothing says so.

        Raises:
            UsageError: another option is given: such a run has its settings.
        """
        from finetune.config import load_config, parse_assignments
        from finetune.training.longer import Longer

        lengths = {"training.epochs": self.epochs, "training.max_steps": self.max_steps}
        overrides = parse_assignments(self.assignments or [])
        others = [name for name, value in self._asdict().items() if value and name not in ("epochs", "max_steps")]
        if (set(overrides) - lengths.keys()) or set(others) - {"assignments"}:
            raise UsageError(
                "--resume takes its settings from the run itself",
                hint="leave out everything but --epochs, --max-steps, --output, --launch and --json",
            )
        overrides |= parse_assignments([f"{key}={value}" for key, value in lengths.items() if value is not None])
        if not overrides:
            return None
        training = load_config(None, environ={}, overrides=overrides, profile=None).config.training
        return Longer(training.epochs, training.max_steps)

    def words(self) -> list[str]:
        """The same options again, for a process of a launched run; whoever starts them says how many there are."""
        given = {name: value for name, value in self._asdict().items() if isinstance(value, str)}
        sets = [each for each in self.assignments or [] if not each.startswith("training.processes=")]
        return [
            *(f"--{name.replace('_', '-')}={value}" for name, value in given.items()),
            *(f"--data={each}" for each in self.data or []),
            *(f"--set={each}" for each in sets),
        ]


def with_settings(command: Callable[..., int]) -> Callable[..., int]:
    """Give a verb every option of `ConfigOptions`; it receives them together, as `settings`."""

    @functools.wraps(command)
    def verb(*args: Any, **given: Any) -> int:
        return command(*args, settings=ConfigOptions(*(given.pop(name) for name in ConfigOptions._fields)), **given)

    # typer reads a verb's options off its signature.
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in ConfigOptions.__annotations__.items()
    ]
    parameters = list(inspect.signature(command).parameters.values())
    at = next(place for place, parameter in enumerate(parameters) if parameter.name == "settings")
    verb.__signature__ = inspect.Signature([*parameters[:at], *shared, *parameters[at + 1 :]])  # type: ignore[attr-defined]
    verb.__annotations__ = {**command.__annotations__, **ConfigOptions.__annotations__}
    return verb


def named_dtype(name: str | None) -> "Dtype | None":
    """A type of model files by its name.

    Raises:
        UsageError: unknown name.
    """
    from finetune.export.model_files import DTYPES

    chosen = next((known for known in DTYPES if known == name), None)
    if name is not None and chosen is None:
        raise UsageError(f"--dtype {name!r} is not one of: {', '.join(DTYPES)}", hint="leave it out for the default")
    return chosen


def require_hypothesis(verb: str) -> None:
    """Refuse a verb of the suite where its extra is not installed."""
    if find_spec("hypothesis") is None:
        raise MissingExtraError(f"{verb} needs Hypothesis", hint=install_line("verify"))
    if "hypothesis" not in sys.modules:
        # What it keeps for itself is not left in the folder where somebody happens to be.
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(cache / "finetune" / "hypothesis"))


def named_outtype(name: str, option: str = "--outtype") -> "Outtype":
    """A type of GGUF files by its name.

    Raises:
        UsageError: unknown name.
    """
    from finetune.export.outtypes import OUTTYPES

    for known in OUTTYPES:
        if known == name:
            return known
    quantised = name.lower().startswith(("q", "iq"))
    raise UsageError(
        f"{option} {name!r} is not in this version; choose from: {', '.join(OUTTYPES)}",
        hint="llama.cpp's own llama-quantize makes it from the f16 file" if quantised else "",
    )
