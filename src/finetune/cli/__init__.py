"""The `ft` command. One file a verb, no logic: each parses, calls, prints."""

import contextlib
import io
import os
import sys


def main() -> None:
    """Run `ft` with the process's arguments; option names may be written with hyphens or underscores."""
    try:
        from finetune.cli.app import run
        from finetune.processes import terminated_as_interrupted
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    # A closed stream is None: what would be written there goes nowhere, and nothing can be read.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # it lives as we do
    # A letter that a stream's encoding does not have is spelled out: nothing fails for its sake when all is done.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Where a file has become a pipe since it was opened, this is set all the same, and then its place is asked.
            with contextlib.suppress(OSError):
                stream.reconfigure(errors="backslashreplace")
    with terminated_as_interrupted():
        code = run(sys.argv[1:])
    sys.exit(code)
