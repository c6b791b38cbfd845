"""Mistakes on the command line, told as every other error is: what is wrong, and the line to type next."""

import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from finetune.cli.options import SHORT_OPTIONS
from finetune.errors import UsageError

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_COMMANDS_ELSEWHERE = {
    "train": "finetune fine-tune fit sft lora dpo",
    "chat": "generate talk infer inference",
    "merge": "fuse",
    "export": "convert quantize gguf",
    "deploy": "serve api",
    "push": "upload publish",
    "runs": "ls list",
    "check": "validate preprocess",
    "verify": "test",
}
"""What other trainers call a command."""


def usage_error(error: Any, words: Sequence[str]) -> UsageError:
    """The parser's error as one of ours.

    Args:
        error: an exception of click's, or of typer's own copy of it: told apart by what they carry.
        words: the command line.
    """
    context: Any = getattr(error, "ctx", None)
    command = context.command_path if context else " ".join(["ft", *words[:1]])
    usage = f"`{command} --help` shows how"
    name, parameter = str(getattr(error, "option_name", None) or ""), getattr(error, "param", None)
    if getattr(error, "possibilities", None) is not None or (name and "No such option" in error.message):
        return UsageError(f"{command} has no option {name}", hint=_nearest_option(name, context, words) or usage)
    if parameter is not None:
        option = parameter.opts[0].startswith("-")
        named = max(parameter.opts, key=len) if option else parameter.metavar or parameter.name.upper()
        meaning = getattr(parameter, "help", None)
        if type(error).__name__ == "MissingParameter":
            return UsageError(f"{command} needs {named}", hint=meaning or usage)
        told = f"{named}: {meaning}" if meaning else usage
        value = _typed_after(named, words)
        reason = f"{error.message[:1].lower()}{error.message[1:]}".rstrip(".")
        return UsageError(f"{named} {value}".rstrip() + f": {reason}", hint=told)
    extra = words[-1] if words else ""
    if "extra argument" in error.message and extra.lower().endswith(DATA_SUFFIXES):
        return UsageError(f"{command} takes no {extra} there", hint=f"it is data: --data {shlex.quote(extra)}")
    if error.message.startswith("No such command"):
        known = list(context.command.commands)
        wrong = next((word for word in words if not word.startswith("-")), "")
        elsewhere = [ours for ours, others in _COMMANDS_ELSEWHERE.items() if wrong.lower() in others.split()]
        near = elsewhere or get_close_matches(wrong.lower(), known, n=1)
        hint = f"did you mean `ft {near[0]}`?" if near else "`ft --help` lists them"
        return UsageError(f"there is no command {wrong!r}", hint=hint)
    message = error.format_message().rstrip(".")
    return UsageError(f"{command}: {message[:1].lower()}{message[1:]}", hint=usage)


def _nearest_option(wrong: str, context: Any, words: Sequence[str]) -> str:
    """The option, or the setting with its `--set`, that was meant; empty where nothing is near."""
    from finetune.config import nearest_assignment, nearest_key

    name = wrong.lstrip("-").replace("-", "_")
    parameters = context.command.params if context else []
    options = [option for parameter in parameters for option in parameter.opts if option.startswith("--")]
    takes_settings = "--set" in options
    typed = _typed_after(wrong, words)
    if near := get_close_matches(wrong, options, n=1, cutoff=0.8):
        return f"did you mean {near[0]}?"
    if takes_settings and not typed and (whole := nearest_assignment(name)):
        return f"did you mean --set {whole}?"
    key, value = nearest_key(name) if takes_settings else None, typed or "VALUE"
    if key and "." in key:
        short = next((option for option, setting in SHORT_OPTIONS.items() if setting == key), None)
        told = f"--{short.replace('_', '-')} {value}" if short else f"--set {key}={value}"
        return f"did you mean {told}?"
    near = get_close_matches(wrong, options, n=1)
    return f"did you mean {near[0]}?" if near else ""


def _typed_after(option: str, words: Sequence[str]) -> str:
    """The value that was typed for an option; empty where there is none."""
    at = next((at for at, word in enumerate(words) if word.partition("=")[0] == option), None)
    if at is None:
        return ""
    value = words[at].partition("=")[2] or "".join(words[at + 1 : at + 2])
    return "" if value.startswith("--") else value
