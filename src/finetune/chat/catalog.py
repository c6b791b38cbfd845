"""The prompt formats everyone knows, as the Jinja templates their models ship."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """A Jinja chat template. `control_tokens` must be single tokens of the tokenizer, or the template is refused."""

    name: str
    jinja: str
    control_tokens: tuple[str, ...] = ()


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
