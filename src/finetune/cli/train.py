"""`ft train`: fine-tune, judge, report."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.console import data_console, exit_code, print_json, say
from finetune.cli.options import (
    AsJson,
    ConfigFile,
    ConfigOptions,
    Verbose,
    named_outtype,
    with_base,
    with_settings,
)
from finetune.errors import UsageError
from finetune.words import without_secrets

if TYPE_CHECKING:
    from finetune.export.outtypes import Outtype

Output = Annotated[Path | None, typer.Option("--output", help="The run folder to make; by default below runs/.")]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with an interrupted run, named here or with --output; with --epochs or --max-steps until it is so "
        "long, finished or not.",
    ),
]

Starter = Annotated[
    str | None, typer.Option("--launch", help="Train in several processes: torchrun, accelerate or mlx.launch.")
]
Processes = Annotated[int | None, typer.Option("--processes", min=1, help="How many processes --launch starts.")]
StarterConfig = Annotated[
    Path | None, typer.Option("--launch-config", help="A file that `accelerate config` wrote, for --launch accelerate.")
]
ExportAs = Annotated[
    str | None, typer.Option("--export", metavar="TYPE", help="Write GGUF of this type too; checked before training.")
]


@with_settings
def command(
    config: ConfigFile = None,
    *,
    settings: ConfigOptions,
    output: Output = None,
    resume: Resume = False,
    launch: Starter = None,
    processes: Processes = None,
    launch_config: StarterConfig = None,
    export_as: ExportAs = None,
    verbose: Verbose = False,
    json_output: AsJson = False,
) -> int:
    """Fine-tune a model, judge the result on measured evidence and write a report.

    Without arguments: the shipped model on the shipped data. Exit code 1 when a criterion failed, 4 when inconclusive.
    """
    from finetune.config import LoadedConfig, load_plan
    from finetune.distributed.environment import NOTES
    from finetune.distributed.launchers import plan_launch
    from finetune.distributed.supervise import read_command, train_together
    from finetune.report.progress import Progress
    from finetune.run.folder import RunFolder
    from finetune.train import fine_tune
    from finetune.training.longer import Longer

    longer: Longer | bool = resume
    if resume:
        output = _run_to_resume(config, output)
        config, longer = None, settings.longer() or True
        plan = load_plan(RunFolder(with_base(RunFolder.unfinished(output, longer=longer is not True).path)).plan)
        loaded = LoadedConfig(plan.config, plan.origins)
    else:
        loaded = settings.load(config)
    outtype = named_outtype(export_as, "--export") if export_as is not None else None
    if outtype is not None:
        from finetune.export.gguf import check_export

        check_export(loaded.config)
    watched = os.environ.get(NOTES)
    typed = without_secrets((read_command(Path(watched)) if watched else "") or shlex.join(["ft", *sys.argv[1:]]))
    if launch or processes or launch_config:
        starter = plan_launch(launch, processes, launch_config, planned=loaded.config.training.processes)
        file = [str(config)] if config else []
        words = ["finetune.cli.worker", "train", *file, *settings.words(), *(["--resume"] if resume else [])]
        folder, run = train_together(starter, loaded.config.backend, words, output=output, command=typed, say=say)
    else:
        with Progress() as progress:
            folder, run = fine_tune(loaded, output=output, resume=longer, command=typed, listener=progress)
    # A process that trained along has nothing to tell, and one that is watched leaves the telling to its watcher.
    if run and not watched:
        _tell(run, folder, verbose=verbose, json_output=json_output)
        if outtype is not None:
            _export(folder, outtype)
        return exit_code(run["outcome"], allow_inconclusive=loaded.config.judge.allow_inconclusive)
    return 0


def _run_to_resume(named: Path | None, output: Path | None) -> Path | None:
    """The run that --resume goes on with, named as the argument or with --output."""
    from finetune.files import is_run
    from finetune.run.find import find_run

    if named is not None and named.is_file() and not any(map(is_run, named.parents)):
        raise UsageError(
            f"--resume takes its settings from the run itself, not from {named}",
            hint="name the run: ft train --resume RUN",
        )
    if named is not None and output is not None:
        raise UsageError(f"two runs are named: {named} and --output {output}", hint="leave out one of the two")
    place = named or output
    return None if place is None else find_run(place)


def _export(folder: Path, outtype: "Outtype") -> None:
    from finetune.export.gguf import export

    done = export(str(folder), outtype=outtype, adapter_only=False, output=None, backend="torch", tell=say)
    say(f"GGUF: {done.path}")


def _tell(run: dict[str, Any], folder: Path, *, verbose: bool, json_output: bool) -> None:
    if json_output:
        print_json({**run, "folder": str(folder)})
    else:
        from finetune.report import print_report

        print_report([{**run, "folder": str(folder)}], data_console(), verbose=verbose)
    say(f"report: {folder / 'report.html'}")
