"""The `ft` command. One file a verb, no logic: each parses, calls, prints."""

import os
import sys


def main() -> None:
    """Run `ft` with the process's arguments; option names may be written with hyphens or underscores."""
    try:
        from finetune.cli.app import run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    # A closed stream is None: what would be written there goes nowhere, and nothing can be read.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # it lives as we do
    sys.exit(run(sys.argv[1:]))
