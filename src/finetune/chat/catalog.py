"""The prompt formats everyone knows, as the Jinja templates their models ship."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.chat.sandbox import variables_read
from finetune.errors import TemplateError
from finetune.reading import read_text

RESERVED = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "documents"})
"""Variables of a template that every program sets by itself."""
Variable = bool | int | float | str


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """A Jinja chat template. `control_tokens` must be single tokens of the tokenizer, or the template is refused.

    `said` are tokens that are meant in an answer, whether the template knows them or not.
    """

    name: str
    jinja: str
    control_tokens: tuple[str, ...] = ()
    said: tuple[str, ...] = ()


ALPACA = TemplateSource(
    "alpaca",
    """\
{%- set roles = messages | map(attribute='role') | list -%}
{%- if roles[0] == 'system' -%}
    {{- messages[0]['content'] + '\\n\\n' -}}
{%- elif 'input' in roles[:2] -%}
    {{- 'Below is an instruction that describes a task, paired with an input that provides further context. ' -}}
    {{- 'Write a response that appropriately completes the request.\\n\\n' -}}
{%- else -%}
    {{- 'Below is an instruction that describes a task. ' -}}
    {{- 'Write a response that appropriately completes the request.\\n\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '### Instruction:\\n' + message['content'] + '\\n\\n' -}}
    {%- elif message['role'] == 'input' -%}
        {{- '### Input:\\n' + message['content'] + '\\n\\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '### Response:\\n' + message['content'] + eos_token -}}
        {%- if not loop.last or add_generation_prompt -%}{{- '\\n\\n' -}}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
""",
)
"""Stanford Alpaca's two prompts (with and without input), turns after the first added in the same manner."""

CHATML = TemplateSource(
    "chatml",
    """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""",
    ("<|im_start|>", "<|im_end|>"),
)

LLAMA2 = TemplateSource(
    "llama2",
    """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set loop_messages = messages[1:] -%}
    {%- set system_message = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- else -%}
    {%- set loop_messages = messages -%}
    {%- set system_message = '' -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + (system_message if loop.first else '') + message['content'].strip() + ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + message['content'].strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
""",
)

LLAMA3 = TemplateSource(
    "llama3",
    """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
    {{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
""",
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

CATALOG = {source.name: source for source in (ALPACA, CHATML, LLAMA2, LLAMA3)}


def built_in_with(tokens: Collection[str]) -> list[TemplateSource]:
    """The built-in templates that have control tokens of their own, where all of them are among these."""
    return [each for each in CATALOG.values() if each.control_tokens and {*each.control_tokens} <= {*tokens}]


def find_template(name: str, own: str | None) -> TemplateSource:
    """The template by its name: one of the catalogue, `tokenizer` for the model's own, or a `.jinja` file.

    Raises:
        TemplateError: no such template; the names that exist are listed.
    """
    if name in CATALOG:
        return CATALOG[name]
    if name == "tokenizer":
        if own is None:
            raise TemplateError(
                "this model's tokenizer ships no chat template", hint=f"choose one of {', '.join(CATALOG)}"
            )
        return TemplateSource("tokenizer", own)
    if name.endswith(".jinja"):
        try:
            return TemplateSource(name, read_text(Path(name)))
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
            raise TemplateError(f"template file {name} cannot be read: {error}", hint="check the path") from None
    raise TemplateError(
        f"unknown template {name!r}", hint=f"choose one of {', '.join(CATALOG)}, tokenizer, or a path to a .jinja file"
    )


def with_variables(source: TemplateSource, variables: Mapping[str, Variable]) -> TemplateSource:
    """The template with variables set at its head, so that it renders alike wherever it travels.

    Raises:
        TemplateError: a variable that the template does not read, or that is not the user's to set.
    """
    if not variables:
        return source
    read = variables_read(source.jinja) - RESERVED
    if unknown := [name for name in variables if name not in read]:
        raise TemplateError(
            f"template {source.name!r} reads no variable {', '.join(map(repr, unknown))} (template.variables)",
            hint=f"it reads {', '.join(sorted(read)) or 'none that can be set'}",
        )
    # JSON's words for these values are Jinja's, null aside, which is none of them.
    written = {name: json.dumps(value, ensure_ascii=False) for name, value in variables.items()}
    head = "".join(f"{{%- set {name} = {value} -%}}" for name, value in written.items())
    return replace(source, jinja=head + source.jinja)
