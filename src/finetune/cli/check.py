"""`ft check`: every problem at once, before anything is loaded."""

from typing import TYPE_CHECKING

from finetune.cli.console import print_data, print_json
from finetune.cli.options import (
    AsJson,
    Assignments,
    ConfigFile,
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
    config: ConfigFile = None,
    *,
    model: ModelName = None,
    data: DataFile = None,
    template: TemplateName = None,
    profile: ProfileName = None,
    assignments: Assignments = None,
    json_output: AsJson = False,
) -> int:
    """Check a configuration, its model, data and template without loading a weight; shows every problem at once.

    Exit code 2 when the configuration is wrong, 3 when model, data or template cannot be used.
    """
    from finetune.assembly.check import find_problems

    try:
        loaded = gather(config, flags_of(model, data, template), assignments, profile)
        problems, code = find_problems(loaded), 3
        problems += _missing_packages(loaded.config)
    except ConfigError as error:
        problems, code = error.problems, 2
    if json_output:
        told = [{"what": problem.what, "where": problem.where, "hint": problem.hint} for problem in problems]
        print_json({"ok": not problems, "problems": told})
    elif problems:
        print_data("\n".join([f"{len(problems)} problem{'s' * (len(problems) > 1)}:", *(f"  {p}" for p in problems)]))
    else:
        print_data("no problems")
    return code if problems else 0


def _missing_packages(config: "TrainingConfig") -> list[Problem]:
    """A problem for the backend and for the trackers that are asked for and not installed."""
    from finetune.backends import require_backend
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
