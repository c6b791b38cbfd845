"""`ft check`: every problem at once, before anything is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.cli.console import print_data, print_json
from finetune.cli.options import (
    AsJson,
    Assignments,
    ConfigFiles,
    DataFile,
    ModelName,
    ProfileName,
    TemplateName,
    flags_of,
    gather,
)
from finetune.errors import ConfigError, FineTuneError, Problem

if TYPE_CHECKING:
    from finetune.config import TrainingConfig


def command(
    configs: ConfigFiles = None,
    *,
    model: ModelName = None,
    data: DataFile = None,
    template: TemplateName = None,
    profile: ProfileName = None,
    assignments: Assignments = None,
    json_output: AsJson = False,
) -> int:
    """Check configurations, their model, data and template without loading a weight; shows every problem at once.

    Exit code 2 when a configuration is wrong, 3 when model, data or template cannot be used.
    """
    flags = flags_of(model, data, template)
    paths: list[Path | None] = list(configs) if configs else [None]
    found = [(path, *_problems(path, flags, assignments, profile)) for path in paths]
    if json_output:
        told = [
            {"file": path and str(path), "what": problem.what, "where": problem.where, "hint": problem.hint}
            for path, problems, _ in found
            for problem in problems
        ]
        print_json({"ok": not told, "problems": told})
    else:
        for path, problems, _ in found:
            print_data("\n".join(_lines(problems, f"{path}: " if len(found) > 1 else "")))
    return min((code for _, _, code in found if code), default=0)


def _problems(
    path: Path | None, flags: dict[str, str | None], assignments: list[str] | None, profile: str | None
) -> tuple[list[Problem], int]:
    """What is wrong with one configuration, and the exit code for it."""
    from finetune.training.check import find_problems

    try:
        loaded = gather(path, flags, assignments, profile)
        problems = find_problems(loaded)
        problems += _missing_packages(loaded.config)
    except ConfigError as error:
        return error.problems, 2
    return problems, 3 if problems else 0


def _lines(problems: list[Problem], head: str) -> list[str]:
    if not problems:
        return [f"{head}no problems"]
    return [f"{head}{len(problems)} problem{'s' * (len(problems) > 1)}:", *(f"  {problem}" for problem in problems)]


def _missing_packages(config: "TrainingConfig") -> list[Problem]:
    """A problem for the backend and for the trackers that are asked for and not installed."""
    from finetune.abilities import require_backend
    from finetune.tracking.choose import require_trackers

    problems: list[Problem] = []
    try:
        require_backend(config.backend)
    except FineTuneError as error:
        problems.append(Problem(error.message, "backend", error.hint))
    try:
        require_trackers(config.tracking.to)
    except FineTuneError as error:
        problems.append(Problem(error.message, "tracking.to", error.hint))
    return problems
