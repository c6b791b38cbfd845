"""`ft check`: every problem at once, before anything is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.cli.console import print_data, print_json
from finetune.cli.options import AsJson, ConfigFiles, ConfigOptions, with_settings
from finetune.errors import ConfigError, FineTuneError, Problem

if TYPE_CHECKING:
    from finetune.config import TrainingConfig
    from finetune.evidence.forecast import RunForecast


@with_settings
def command(configs: ConfigFiles = None, *, settings: ConfigOptions, json_output: AsJson = False) -> int:
    """Check configurations, their model, data and template without loading a weight; shows every problem at once.

    Without a problem: what the run will be, its minutes as an estimate. Exit code 2 when a configuration is wrong, 3
    when model, data or template cannot be used.
    """
    paths: list[Path | None] = list(configs) if configs else [None]
    found = [(path, *_check(path, settings)) for path in paths]
    if json_output:
        listed = [
            {"file": path and str(path), "what": problem.what, "where": problem.where, "hint": problem.hint}
            for path, problems, _, _ in found
            for problem in problems
        ]
        runs = [{"file": path and str(path), **outlook.values()} for path, _, outlook, _ in found if outlook]
        print_json({"ok": not listed, "problems": listed, "runs": runs})
    else:
        for path, problems, outlook, _ in found:
            head = f"{path}: " if len(found) > 1 else ""
            count = f"{len(problems)} problem{'s' * (len(problems) > 1)}:" if problems else "no problems"
            said = problems or (outlook.sentences() if outlook else [])
            print_data("\n".join([f"{head}{count}", *(f"  {each}" for each in said)]))
    return min((code for *_, code in found if code), default=0)


def _check(path: Path | None, settings: ConfigOptions) -> tuple[list[Problem], "RunForecast | None", int]:
    """The problems of one configuration, or what its run will be, and the exit code."""
    from finetune.evidence.forecast import forecast_run
    from finetune.training.check import find_problems

    try:
        loaded = settings.load(path)
        problems, prepared = find_problems(loaded)
        problems += _missing_packages(loaded.config)
    except ConfigError as error:
        return error.problems, None, 2
    if problems or prepared is None:
        return problems, None, 3
    return [], forecast_run(prepared), 0


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
