"""`ft check`: every problem at once, before anything is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.cli.console import print_data, print_json
from finetune.cli.options import AsJson, ConfigFiles, ConfigOptions, with_settings
from finetune.errors import ConfigError, FineTuneError, Problem

if TYPE_CHECKING:
    from finetune.config import TrainingConfig


@with_settings
def command(configs: ConfigFiles = None, *, settings: ConfigOptions, json_output: AsJson = False) -> int:
    """Check configurations, their model, data and template without loading a weight; shows every problem at once.

    Exit code 2 when a configuration is wrong, 3 when model, data or template cannot be used.
    """
    paths: list[Path | None] = list(configs) if configs else [None]
    found = [(path, *_problems(path, settings)) for path in paths]
    if json_output:
        listed = [
            {"file": path and str(path), "what": problem.what, "where": problem.where, "hint": problem.hint}
            for path, problems, _ in found
            for problem in problems
        ]
        print_json({"ok": not listed, "problems": listed})
    else:
        for path, problems, _ in found:
            head = f"{path}: " if len(found) > 1 else ""
            count = f"{len(problems)} problem{'s' * (len(problems) > 1)}:" if problems else "no problems"
            print_data("\n".join([f"{head}{count}", *(f"  {problem}" for problem in problems)]))
    return min((code for _, _, code in found if code), default=0)


def _problems(path: Path | None, settings: ConfigOptions) -> tuple[list[Problem], int]:
    """The problems of one configuration, and its exit code."""
    from finetune.training.check import find_problems

    try:
        loaded = settings.load(path)
        problems = find_problems(loaded)
        problems += _missing_packages(loaded.config)
    except ConfigError as error:
        return error.problems, 2
    return problems, 3 if problems else 0


def _missing_packages(config: "TrainingConfig") -> list[Problem]:
    """A problem for the backend and for the trackers that are asked for and not installed."""
    from finetune.abilities import require_backend
    from finetune.tracking.tracker import require_trackers

    problems: list[Problem] = []
    needed: dict[str, Callable[[], None]] = {
        "backend": lambda: require_backend(config.backend),
        "tracking.to": lambda: require_trackers(config.tracking.to),
    }
    for key, require in needed.items():
        try:
            require()
        except FineTuneError as error:
            problems.append(Problem(error.message, key, error.hint))
    return problems
