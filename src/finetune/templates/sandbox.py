"""Compiles Jinja chat templates in a sandbox, with the few helpers that models' templates expect."""

import json
from collections.abc import Callable
from datetime import date
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.errors import TemplateError

MAX_TEMPLATE_CHARS = 200_000


class TemplateRefusedError(Exception):
    """The template itself called `raise_exception`: these messages do not fit it."""


class _GenerationTag(Extension):
    """Accepts `{% generation %}...{% endgeneration %}` and keeps its body: our marks come from the segments."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as an instance variable

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Drop the tag, keep what is inside it."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _refuse
    # A template that prints today's date would render differently every day: it is given one fixed day.
    environment.globals["strftime_now"] = date(2024, 7, 26).strftime
    return environment


def _refuse(message: str) -> None:
    raise TemplateRefusedError(message)


def compile_template(name: str, source: str) -> Callable[..., str]:
    """A function that renders `source` in the sandbox; keyword arguments are the template's variables.

    Raises:
        TemplateError: the template is too large or does not parse (with the line).
    """
    if len(source) > MAX_TEMPLATE_CHARS:
        raise TemplateError(f"template {name!r} has {len(source)} characters, more than {MAX_TEMPLATE_CHARS}")
    try:
        template = _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise TemplateError(
            f"template {name!r} does not parse: line {error.lineno}: {error.message}", hint="mend the Jinja syntax"
        ) from None
    except (RecursionError, SyntaxError) as error:  # too deep for Jinja, or for the Python that Jinja writes
        raise TemplateError(
            f"template {name!r} cannot be compiled: {error}", hint="nest its tags less deeply"
        ) from None

    def render(**variables: Any) -> str:
        return template.render(**variables)

    return render
