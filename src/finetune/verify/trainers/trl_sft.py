"""TRL's SFTTrainer as a subject: run by an interpreter that has TRL."""

from collections.abc import Sequence
from typing import Any

import datasets
import trl
from serving import UnsupportedError
from transformers_settings import Given, Kind, TrainerInputs
from transformers_side import TransformersSide

_TURN = "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}"
"""A turn in the template of models that the suite makes."""
_MARKED_TURN = (
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' + '\\n' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' + '\\n' -}}{%- endif -%}"
)
"""The same with marks, and with the line end among what is learned, as in TRL's own templates for training."""


def _build(job: TrainerInputs) -> Any:
    """An SFTTrainer over rows in the shapes of TRL's documentation."""
    # Of a conversation we teach the answers; of pairs that is its default.
    if any("messages" in row for row in job.train):
        job.arguments.assistant_only_loss = True
        job.tokenizer.chat_template = _marked(job.tokenizer.chat_template)
    return trl.SFTTrainer(
        model=job.model,
        args=job.arguments,
        train_dataset=_data(job.train),
        eval_dataset=None if job.held_out is None else _data(job.held_out),
        processing_class=job.tokenizer,
        peft_config=job.adapter,
    )


def _marked(template: str | None) -> str:
    """A template that says what of it is an answer, as TRL asks its users to write it; it renders the same."""
    own = template or ""
    if "{%- generation %}" in own:
        return own
    if _TURN not in own:
        raise UnsupportedError("its template does not say what of it is an answer, and TRL asks for that")
    return own.replace(_TURN, _MARKED_TURN)


def _data(rows: Sequence[Given]) -> Any:
    shaped = [{**_shaped(row), "row": place} for place, row in enumerate(rows)]
    # Without that, Arrow gives each call the arguments of all others.
    return datasets.Dataset.from_list(shaped, on_mixed_types="use_json")


def _shaped(row: Given) -> dict[str, Any]:
    """A pair as a conversation, so that the template is used; what TRL reads itself stays as it is."""
    pair = {"prompt", "completion"} <= set(row)
    if "input_ids" in row or "messages" in row or "text" in row or (pair and isinstance(row["prompt"], list)):
        return dict(row)
    if pair:
        return {
            **row,
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
    raise UnsupportedError(f"it reads no rows of the keys {', '.join(row)}")


def main() -> None:
    """Answer questions."""
    datasets.disable_caching()
    datasets.disable_progress_bars()
    packages = ("trl", "transformers", "peft", "torch", "accelerate", "datasets")
    has = {"tokens.max_length": "max_length", "training.packing": "packing"}
    TransformersSide(Kind("TRL SFTTrainer", packages, trl.SFTConfig, _build, has)).serve()


if __name__ == "__main__":
    main()
