"""Puts the verbs together and turns every outcome into an exit code."""

import errno
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

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
from finetune.cli.usage import usage_error
from finetune.errors import FineTuneError, UsageError

INTERRUPTED = 130
_DISK = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT, errno.ESTALE)
_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)
VERBS = {
    "Train": {
        train: "Fine-tune a model, and prove by measurements that it worked",
        init: "Write a configuration file to start from",
        check: "Check configuration, model and data before anything is loaded",
        estimate: "Estimate peak memory, by component",
        report: "Show the report of one run, or several side by side",
        runs: "List runs: model, data, verdict, age",
        schema: "Print the JSON Schema of the configuration",
    },
    "Use the result": {
        chat: "Talk to the fine-tuned model",
        evaluate: "Score base and fine-tuned model",
        merge: "Fold the adapter into its base: an ordinary model folder",
        export: "Write a GGUF file",
        import_: "Make a model folder of a GGUF file",
        compare: "Check that merged, GGUF and MLX copies answer alike",
        deploy: "Serve with Ollama or llama.cpp, verified",
        push: "Send a run to the hub, held to what was sent",
    },
    "Check a trainer": {
        judge: "Judge a fine-tune that any trainer made",
        verify: "Run the conformance suite on a trainer",
        prove: "Inject known bugs and count which are caught",
        replay: "Try a finding of the suite again",
    },
}
"""Every verb with its summary, in the groups of `ft --help`."""


class _Verb(TyperCommand):
    """A command whose usage line names what it needs as it is, and what may be left out in brackets."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The pieces of the usage line."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]


class _Verbs(TyperGroup):
    """All commands, listed in groups with whole summaries."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the groups."""
        for title, group in VERBS.items():
            with formatter.section(title):
                formatter.write_dl([(_name_of(verb), summary) for verb, summary in group.items()], col_max=12)


def _name_of(verb: ModuleType) -> str:
    # A verb that is a keyword of Python's has a file whose name ends with _.
    return verb.__name__.rsplit(".", 1)[-1].rstrip("_")


app = typer.Typer(
    name="ft",
    cls=_Verbs,
    help="Fine-tune language models with LoRA, and prove with measured evidence that it worked.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in VERBS.values():
    for verb, summary in group.items():
        app.command(_name_of(verb), cls=_Verb, short_help=summary)(verb.command)


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
    from finetune.distributed.environment import rank_of

    rank = rank_of(os.environ)
    say(f"rank {rank}: error: {error}" if rank else f"error: {error}")


def run(arguments: list[str], complain: Callable[[FineTuneError], None] = _complain) -> int:
    """Run one command and return its exit code.

    0 done, 1 failed, 2 usage, 3 refused, 4 inconclusive or nothing to judge, 130 interrupted.
    """
    words = [with_hyphens(word) for word in arguments]
    try:
        result = app(words, standalone_mode=False, prog_name="ft")
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
        if error.errno in _NAMES:
            shown = str(error.filename)[:80]
            complain(UsageError(f"{shown!r} cannot be a path: {error.strerror}", hint="give a shorter or another one"))
            return 2
        if error.errno in _DISK and error.filename:
            say(
                f"error: {error.filename}: {error.strerror}\n  hint: see to that disk; what was written there is intact"
            )
            return 1
        if error.errno != errno.ENOSPC:
            raise
        say("error: no space left to print the result\n  hint: what was computed is in the run folder")
        return 1
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise  # a bug keeps its traceback
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show(file=sys.stderr)  # type: ignore[attr-defined]
            return 2
        complain(usage_error(error, words))
        return 2


def with_hyphens(word: str) -> str:
    """An option's name with hyphens for underscores; its value and everything else as it is."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value
