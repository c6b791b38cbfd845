"""`ft schema`: the configuration's JSON Schema."""

from finetune.cli.console import print_json


def command() -> int:
    """Print the JSON Schema of the configuration, for editors and other programs."""
    from finetune.config import json_schema

    print_json(json_schema())
    return 0
