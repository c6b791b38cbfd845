"""Puts the verbs together and turns every outcome into an exit code."""

import errno
import os
import sys
from collections.abc import Callable

import typer

from finetune.cli import (
    chat,
    check,
    compare,
    deploy,
    estimate,
    evaluate,
    export,
    import_,
    init,
    judge,
    merge,
    prove,
    push,
    replay,
    report,
    runs,
    schema,
    train,
    verify,
)
from finetune.cli.console import say
from finetune.distributed.environment import rank_of
from finetune.errors import FineTuneError

INTERRUPTED = 130
app = typer.Typer(
    name="ft",
    help="Fine-tune language models with LoRA, and prove with measured evidence that it worked.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_MAKE = (
    train,
    check,
    estimate,
    init,
    schema,
    evaluate,
    chat,
    report,
    runs,
    import_,
    merge,
    export,
    compare,
    deploy,
    push,
)
_PROVE = (judge, verify, prove, replay)
for verb in (*_MAKE, *_PROVE):
    # A verb that is a keyword of Python's has a file whose name ends with _.
    app.command(verb.__name__.rsplit(".", 1)[-1].rstrip("_"))(verb.command)


def _version(value: bool) -> None:  # noqa: FBT001  # typer hands the flag over by position
    if value:
        import finetune

        typer.echo(f"finetune-suite {finetune.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),  # noqa: FBT001, FBT003
) -> None:
    """Fine-tune language models with LoRA, and prove with measured evidence that it worked."""


def _complain(error: FineTuneError) -> None:
    rank = rank_of(os.environ)
    say(f"rank {rank}: error: {error}" if rank else f"error: {error}")


def run(arguments: list[str], complain: Callable[[FineTuneError], None] = _complain) -> int:
    """Run one command and return its exit code.

    0 done, 1 failed, 2 usage, 3 refused, 4 inconclusive or nothing to judge, 130 interrupted.
    """
    try:
        result = app([with_hyphens(word) for word in arguments], standalone_mode=False, prog_name="ft")
        if result == INTERRUPTED:
            say("interrupted")
        return result if isinstance(result, int) else 0
    except FineTuneError as error:
        complain(error)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone.
        sys.stderr.close()
        return 1
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        say("error: no space left to print the result\n  hint: what was computed is in the run folder")
        return 1
    except Exception as error:
        return _usage_error(error)


def _usage_error(error: Exception) -> int:
    """Show a command-line mistake the way click does; anything else is a bug and keeps its traceback."""
    show = getattr(error, "show", None)
    if show is None:
        raise error
    show(file=sys.stderr)
    return int(getattr(error, "exit_code", 2))


def with_hyphens(word: str) -> str:
    """An option's name with hyphens for underscores; its value and everything else as it is."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value
