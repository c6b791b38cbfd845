"""The `ft` command. One file a verb, no logic: each parses, calls, prints."""

import sys


def main() -> None:
    """Run `ft` with the process's arguments; option names may be written with hyphens or underscores."""
    from finetune.cli.app import run

    sys.exit(run(sys.argv[1:]))
