"""`ft check`: every problem at once, before anything is loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import TextWrapper
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.console import data_console, print_data, print_json
from finetune.cli.options import AsJson, ConfigFiles, ConfigOptions, with_settings
from finetune.errors import ConfigError, FineTuneError, Problem
from finetune.words import without_secrets

if TYPE_CHECKING:
    from finetune.chat.preview import Shown
    from finetune.config import TrainingConfig
    from finetune.evidence.forecast import RunForecast
    from finetune.records import TokenizedRow


Show = Annotated[
    int | None,
    typer.Option(
        "--show",
        min=0,
        help="Show so many rows as tokens, the learned ones coloured or in brackets; 1 where one file is checked.",
    ),
]


@dataclass(frozen=True)
class _Checked:
    """What became of one configuration: its problems, or what its run will be, and its first rows as tokens."""

    path: Path | None
    problems: list[Problem]
    code: int
    outlook: "RunForecast | None" = None
    rows: Sequence[tuple["TokenizedRow", "Sequence[Shown]"]] = ()

    def values(self) -> dict[str, Any]:
        """The run as JSON values."""
        assert self.outlook is not None
        from finetune.chat.preview import laid_out

        rows = [
            {
                "row": row.where,
                "tokens": len(row.ids),
                "trained_tokens": row.target_count,
                "text": "".join(said for said, _ in laid_out(tokens, brackets=True)).rstrip(),
            }
            for row, tokens in self.rows
        ]
        return {"file": self.path and str(self.path), **self.outlook.values(), "shown": rows}


@with_settings
def command(
    configs: ConfigFiles = None, *, settings: ConfigOptions, show: Show = None, json_output: AsJson = False
) -> int:
    """Check configurations, their model, data and template without loading a weight; shows every problem at once.

    Without a problem: what the run will be, its minutes as an estimate, and the first row as tokens. Exit code 2 when
    a configuration is wrong, 3 when model, data or template cannot be used.
    """
    paths: list[Path | None] = list(configs) if configs else [None]
    count = int(len(paths) == 1) if show is None else show
    found = [_without_secrets(_check(path, settings, count)) for path in paths]
    if json_output:
        listed = [
            {"file": each.path and str(each.path), "what": problem.what, "where": problem.where, "hint": problem.hint}
            for each in found
            for problem in each.problems
        ]
        print_json({"ok": not listed, "problems": listed, "runs": [each.values() for each in found if each.outlook]})
    else:
        for each in found:
            head = f"{each.path}: " if len(found) > 1 else ""
            number = len(each.problems)
            told = f"{number} problem{'s' * (number > 1)}:" if number else "no problems"
            print_data("\n".join([f"{head}{told}", *(f"  {line}" for line in each.problems)]))
            if each.outlook:
                _print_run(each.outlook, whole=len(found) == 1)
            for row, tokens in each.rows:
                _print_row(row, tokens)
    return min((each.code for each in found if each.code), default=0)


def _without_secrets(checked: _Checked) -> _Checked:
    problems = [Problem(*map(without_secrets, (each.what, each.where, each.hint))) for each in checked.problems]
    return replace(checked, problems=problems)


def _print_run(outlook: "RunForecast", *, whole: bool) -> None:
    """What a run will be: warnings first, then (of one run alone) what it reads, then what it comes to."""
    from rich.text import Text

    from finetune.report.data_lines import data_lines

    console, values = data_console(), outlook.values()
    block = "█" if "█".encode(console.encoding, "replace") != b"?" else "#"
    for warning in outlook.warnings:
        console.print(Text(_wrapped(f"WARNING: {warning}"), style="bold yellow"), soft_wrap=True)
    lines: list[str] = []
    if whole:
        for name in ("rows", *outlook.beside):
            lines += data_lines(f"data.{'train' if name == 'rows' else name}", values[name], block=block)
        lines += [f"note: {note}" for note in outlook.notes]
    print_data("\n".join(_wrapped(line) for line in [*lines, *outlook.sentences()]))


def _wrapped(line: str) -> str:
    """A line indented and folded at 80 columns; a path that is longer stands alone, in one piece."""
    indent = " " * (2 + len(line) - len(line.lstrip()))
    fold = TextWrapper(
        width=80,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
    return indent + line.lstrip() if len(line) < 79 else fold.fill(line.lstrip())


def _print_row(row: "TokenizedRow", tokens: "Sequence[Shown]") -> None:
    """A row as tokens: what is learned in green, or in brackets where nothing is coloured."""
    from rich.text import Text

    from finetune.chat.preview import CLOSE, OPEN, laid_out, printable

    console = data_console()
    plain = console.no_color or console.color_system is None

    def writable(text: str) -> str:
        return text.encode(console.encoding, "backslashreplace").decode(console.encoding)

    how = f"in {OPEN} {CLOSE}" if plain else "in green"
    where = printable(row.where)
    head = f"  {where}: {len(row.ids):,} tokens, {row.target_count:,} of them learned ({how})\n    "
    text = Text(writable(head))
    for said, each in laid_out(tokens, brackets=plain):
        style = "bold green" if each.learned and not each.left_out else "dim" if each.control else ""
        text.append(writable(said.replace("\n", "\n    ")), style)
    text.rstrip()
    console.print(text, soft_wrap=True, highlight=False)


def _check(path: Path | None, settings: ConfigOptions, count: int) -> _Checked:
    """The problems of one configuration, or what its run will be with so many of its rows, and the exit code."""
    from finetune.chat.preview import shown_tokens
    from finetune.evidence.forecast import forecast_run
    from finetune.training.check import find_problems

    try:
        loaded = settings.load(path)
        problems, prepared = find_problems(loaded)
        problems += _missing_packages(loaded.config)
    except ConfigError as error:
        return _Checked(path, error.problems, 2)
    if problems or prepared is None:
        return _Checked(path, problems, 3)
    rows = [(row, shown_tokens(row, prepared.encoder.tokenizer)) for row in prepared.train.rows[:count]]
    return _Checked(path, [], 0, forecast_run(prepared), rows)


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
