"""`ft train`: fine-tune, judge, report."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from finetune.cli.console import data_console, print_json, say
from finetune.cli.options import (
    AsJson,
    Assignments,
    BackendName,
    ConfigFile,
    DataFile,
    ModelName,
    ProfileName,
    TemplateName,
    flags_of,
    gather,
)
from finetune.errors import UsageError

Output = Annotated[Path | None, typer.Option("--output", help="The run folder to make; by default below runs/.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run (--output names it).")]


def command(
    config: ConfigFile = None,
    *,
    model: ModelName = None,
    data: DataFile = None,
    template: TemplateName = None,
    backend: BackendName = None,
    profile: ProfileName = None,
    output: Output = None,
    assignments: Assignments = None,
    resume: Resume = False,
    json_output: AsJson = False,
) -> int:
    """Fine-tune a model, judge the result on measured evidence and write a report.

    Without arguments: the shipped model on the shipped data. Exit code 1 when a criterion is broken.
    """
    from finetune.artifacts.run_folder import RunFolder
    from finetune.cli.progress import Progress
    from finetune.config import LoadedConfig, load_plan
    from finetune.pipeline import fine_tune

    flags = flags_of(model, data, template, backend)
    if resume:
        if config or profile or assignments or any(flags.values()):
            raise UsageError(
                "--resume takes its settings from the run itself", hint="leave out everything but --output and --json"
            )
        plan = load_plan(RunFolder.unfinished(output).plan)
        loaded = LoadedConfig(plan.config, plan.origins)
    else:
        loaded = gather(config, flags, assignments, profile)
    asked = shlex.join(["ft", *sys.argv[1:]])
    with Progress() as progress:
        folder, run = fine_tune(loaded, output=output, resume=resume, command=asked, listener=progress)
    if json_output:
        print_json({**run, "folder": str(folder)})
    else:
        from finetune.report import print_report

        print_report([{**run, "folder": str(folder)}], data_console())
    say(f"report: {folder / 'report.html'}")
    return 1 if run["outcome"] == "broken" else 0
