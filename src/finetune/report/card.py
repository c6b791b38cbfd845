"""The model card of what a run trained: base, data, settings, measured scores; nothing in it is guessed.

Source: Hugging Face, "Model cards" and its evaluation format, `model-index`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from finetune.adapters.kinds import ADAPTER_KINDS
from finetune.config.yaml_file import yaml_values
from finetune.errors import ModelError
from finetune.intervals import wilson_interval
from finetune.models.travel import hub_id, words_without_places

CARD = "README.md"
Form = Literal["adapter", "model", "merged", "gguf"]
_SHOWN_SETTINGS = ("training.", "adapter.", "tokens.max_length", "tokens.truncation", "template.name")
_QUESTIONS = {"learning": ("data.train", "facts"), "retention": ("data.retention", "retention")}
_BY_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({here!r})
tokenizer = AutoTokenizer.from_pretrained({here!r})
```

`chat_template.jinja` beside the weights is the template that it was trained with."""
_USE: Mapping[Form, str] = {
    "adapter": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, {here!r})
tokenizer = AutoTokenizer.from_pretrained({here!r})
```

`chat_template.jinja` beside the weights is the template that it was trained with.""",
    "model": _BY_TRANSFORMERS,
    "merged": _BY_TRANSFORMERS,
    "gguf": """```bash
llama-server --jinja --model path/to/FILE.gguf
```

Each file holds the template that it was trained with.""",
}


def model_card(record: Mapping[str, Any], licence: str, form: Form, more: Sequence[str] = ()) -> str:
    """The card of a run's result, from its record.

    No path of this machine is in it: a base from the hub has its id, any other its name and the hashes of its files.

    Args:
        record: the content of `run.json`.
        licence: the base's, as its own card names it; empty where it names none.
        form: what the folder holds.
        more: further facts, as sentences.
    """
    name, kind = _base_name(record), str(_setting(record, "adapter.kind"))
    title = "the whole model was trained" if kind == "full" else f"a {ADAPTER_KINDS[kind].title} adapter"
    title += ", merged into its base" if form in ("merged", "gguf") and kind != "full" else ""
    here = f"path/to/{'adapter' if form == 'adapter' else 'model'}"
    base = name if _hub_id(record) else f"path/to/{name}"
    head = yaml.safe_dump(_head(record, licence, form), sort_keys=False, allow_unicode=True)
    lines = [
        "---",
        head.rstrip(),
        "---",
        f"# {name}, fine-tuned",
        "",
        f"Base `{name}` ({'hub' if _hub_id(record) else record['model']['source']}); {title}. Made and judged by "
        f"FineTune {record['versions']['finetune-suite']}: outcome **{record['outcome']}**.",
        "",
        "## Use",
        "",
        _USE[form].format(base=base, here=here),
        "",
        "## Base",
        "",
        f"- Licence: `{licence}`, as the base's card names it."
        if licence
        else "- The base names no licence that can be read: ask its makers before you pass this on.",
        *[f"- `{Path(str(file['path'])).name}`: sha256 `{file['sha256']}`" for file in record["model"]["files"]],
        "",
        "## Data and settings",
        "",
        *[f"- {fact}" for fact in _data(record)],
        *[f"- `{key}`: {value}" for key, value in _settings(record)],
        "",
        "## What was measured",
        "",
        *_scores(record),
        *[f"- {sentence}" for sentence in more],
    ]
    # An error that was measured as such may quote a place.
    return words_without_places("\n".join(lines).rstrip() + "\n")


def licence_in(folder: Path) -> str:
    """The licence that the model card in a folder names at its head; empty where there is none.

    Raises:
        ModelError: the head of the card is no YAML.
    """
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    parts = text.split("---\n", 2)
    if not text.startswith("---\n") or len(parts) < 3:
        return ""
    try:
        head = yaml_values(parts[1])
    except ValueError as error:
        raise ModelError(f"{card}: the head of the model card is no YAML: {error}", hint="mend it") from None
    named = head.get("license") if isinstance(head, dict) else None
    return named if isinstance(named, str) else ""


def _head(record: Mapping[str, Any], licence: str, form: Form) -> dict[str, Any]:
    """What the hub reads: library, licence, base, and the scores in its evaluation format."""
    kind = str(_setting(record, "adapter.kind"))
    head: dict[str, Any] = {
        "library_name": {"adapter": "peft", "gguf": "gguf"}.get(form, "transformers"),
        "pipeline_tag": "text-generation",
        "tags": ["finetune", *([] if kind == "full" else [kind]), *(["gguf"] if form == "gguf" else [])],
    }
    if licence:
        head["license"] = licence
    if known := _hub_id(record):
        head["base_model"] = known
    if results := list(_results(record)):
        head["model-index"] = [{"name": f"{_base_name(record)}-{kind}", "results": results}]
    return head


def _results(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, tally in _tallies(record):
        right, count = tally["tuned"]
        low, high = wilson_interval(right, count)
        yield {
            "task": {"type": "text-generation"},
            "dataset": {"name": f"{_data_name(record, name)} ({name})", "type": _data_name(record, name)},
            "metrics": [
                {
                    "type": "exact_match",
                    "value": round(right / count, 4),
                    "name": f"exact match, {right} of {count}",
                    "args": {"right": right, "count": count, "interval_95": [round(low, 4), round(high, 4)]},
                }
            ],
        }
    if looks := _held_out(record):
        data = _setting(record, "data.valid") or _setting(record, "data.train") or "facts"
        yield {
            "task": {"type": "text-generation"},
            "dataset": {"name": f"{Path(str(data)).name} (validation)", "type": Path(str(data)).name},
            "metrics": [{"type": "loss", "value": round(looks[1]["loss"], 6), "args": {"tokens": looks[1]["tokens"]}}],
        }


def _scores(record: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for name, tally in _tallies(record):
        low, high = wilson_interval(*tally["tuned"])
        cells = [f"{right} of {count}" for right, count in (tally["base"], tally["tuned"])]
        rows.append(
            f"| answers right, word for word ({name}: {_data_name(record, name)}) | {cells[0]} | {cells[1]} "
            f"| {low:.1%} to {high:.1%} |"
        )
    if looks := _held_out(record):
        first, last = (f"{each['loss']:.4f}" for each in looks)
        rows.append(f"| validation loss, {looks[1]['tokens']:,} tokens | {first} | {last} | |")
    if rows:
        yield from ("| score | base | fine-tuned | 95% interval |", "|---|---|---|---|", *rows, "")
    for verdict in record.get("verdicts") or ():
        if not verdict.get("companion"):
            measured = verdict["measured"] or verdict["reason"]
            yield f"- {verdict['title']}: {verdict['outcome']}" + (f" ({measured})" if measured else "")
    for what, why in (record.get("not_measured") or {}).items():
        yield f"- Not measured, {what}: {why}"


def _tallies(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, tuple[int, int]]]]:
    """How many answers of base and tuned model are right, of how many, by what the questions show."""
    for name in _QUESTIONS:
        sides = (record.get("scores") or {}).get(name) or {}
        answers = [(sides.get(who) or {}).get("answers") or () for who in ("base", "tuned")]
        base, tuned = ((sum(bool(each["right"]) for each in side), len(side)) for side in answers)
        if base[1] and tuned[1]:
            yield name, {"base": base, "tuned": tuned}


def _held_out(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The validation loss before training, and at the step that was kept."""
    looks = {look["step"]: look for look in record["losses"]["held_out"]}
    kept = record["training"]["kept_step"]
    return (looks[0], looks[kept]) if kept and 0 in looks and kept in looks else None


def _data(record: Mapping[str, Any]) -> Iterator[str]:
    for file in record["data"].get("files") or ():
        yield f"`{Path(str(file['path'])).name}`: sha256 `{file['sha256']}`"
    for name in ("train", "valid", "rehearsal"):
        if counts := record["data"].get(name):
            rows = f"{counts['kept']:,} of {counts['read']:,} rows"
            yield f"{name}: {rows}, {counts['tokens']:,} tokens, {counts['trained_tokens']:,} of them trained"
    training = record["training"]
    yield f"Steps: {training['steps']:,}; kept is step {training['kept_step']:,}"


def _settings(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for entry in record["plan"]:
        # How often a run was saved changes nothing of what it trained, and no byte beside it.
        shown = entry["key"].startswith(_SHOWN_SETTINGS) and entry["key"] != "training.save_every"
        if shown and entry["value"] is not None:
            value = entry["value"]
            yield entry["key"], f"`{Path(value).name if isinstance(value, str) and '/' in value else value}`"


def _setting(record: Mapping[str, Any], key: str) -> object:
    return next((entry["value"] for entry in record["plan"] if entry["key"] == key), None)


def _data_name(record: Mapping[str, Any], questions: str) -> str:
    key, shipped = _QUESTIONS[questions]
    return Path(str(_setting(record, key) or shipped)).name


def _base_name(record: Mapping[str, Any]) -> str:
    """A hub id as it is, and of a folder its name alone."""
    return _hub_id(record) or Path(str(record["model"]["name"])).expanduser().resolve().name


def _hub_id(record: Mapping[str, Any]) -> str:
    """The base's hub id, also where the folder in the hub's cache was named; "" where it has none."""
    name = str(record["model"]["name"])
    return name if record["model"]["source"] == "hub" else hub_id(Path(name).expanduser())
