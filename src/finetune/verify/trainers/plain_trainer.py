"""transformers' own Trainer with PEFT as a subject, with the preparation of rows that its users write themselves."""

from typing import Any

import peft
import transformers
from serving import UnsupportedError
from transformers_settings import IGNORED, Given, Kind, TrainerInputs
from transformers_side import TransformersSide


class _Arguments:
    """The library's arguments, and the one length that its users' own preparation needs."""

    def __new__(cls, *, max_length: int | None = None, **given: object) -> Any:
        """Its `TrainingArguments`."""
        arguments = transformers.TrainingArguments(**given)
        arguments.max_length = max_length
        return arguments


def _build(job: TrainerInputs) -> Any:
    collator = transformers.DataCollatorForSeq2Seq(job.tokenizer, label_pad_token_id=IGNORED)
    prepared = [
        [{**_prepared(row, job), "row": place} for place, row in enumerate(rows)]
        for rows in (job.train, job.held_out or ())
    ]
    return transformers.Trainer(
        model=job.model if job.adapter is None else peft.get_peft_model(job.model, job.adapter),
        args=job.arguments,
        train_dataset=prepared[0],
        eval_dataset=prepared[1] or None,
        processing_class=job.tokenizer,
        data_collator=collator,
    )


def _prepared(row: Given, job: TrainerInputs) -> dict[str, Any]:
    """What tutorials do: the prompt as the template renders it, then the whole, and labels for what is new."""
    if "input_ids" in row:
        return {**row, "attention_mask": [1] * len(row["input_ids"])}
    if not {"prompt", "completion"} <= set(row):
        raise UnsupportedError(f"this preparation reads no rows of the keys {', '.join(row)}")
    question = [{"role": "user", "content": row["prompt"]}]
    whole = [*question, {"role": "assistant", "content": row["completion"]}]
    prompt = job.tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    ids = job.tokenizer.apply_chat_template(whole, return_dict=False)[: job.arguments.max_length]
    labels = [IGNORED] * min(len(prompt), len(ids)) + ids[len(prompt) :]
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def main() -> None:
    """Answer questions."""
    packages = ("transformers", "peft", "torch", "accelerate")
    kind = Kind("transformers Trainer with PEFT", packages, _Arguments, _build, {"tokens.max_length": "max_length"})
    TransformersSide(kind).serve()


if __name__ == "__main__":
    main()
