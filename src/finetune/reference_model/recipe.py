"""Builds the shipped models from nothing: `python -m finetune.reference_model.recipe` (`make reference-model`).

Seeded throughout; the same machine and versions give the same bytes. Needs the torch extra and about half an hour
on two cores.
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.backends import open_backend
from finetune.chat.catalog import CATALOG, CHATML, LLAMA3, TemplateSource
from finetune.chat.encode import encode_row
from finetune.chat.render import ChatTemplate
from finetune.chat.tokenizer import FileTokenizer
from finetune.data.batches import epoch_batches
from finetune.data.shipped import FOLDER as DATA_FOLDER
from finetune.data.shipped import write_shipped_sets
from finetune.events import StepDone
from finetune.files import write_json, write_text
from finetune.models.locate import SHIPPED_FOLDER
from finetune.records import Batch, Document, ModelLocation, Optimization, Rendered, TokenizedRow
from finetune.reference_model.card import write_card
from finetune.reference_model.corpus import WORDS, Text, draw_text
from finetune.reference_model.vocabulary import Vocabulary, build_tokenizer
from finetune.training.loop import LoopPlan, train

SEED = 0
STEPS = 3000
_BATCH_SIZE = 48
_TEXTS_PER_EPOCH = 40 * _BATCH_SIZE
_TEXTS_PER_VOCABULARY = 6000
_WORD_REPEATS = 20


@dataclass(frozen=True, slots=True)
class Design:
    """One shipped model: its shape (deliberately awkward: equal sizes hide bugs) and its tokenizer."""

    name: str
    config: Mapping[str, Any]
    vocabulary: Vocabulary
    template: TemplateSource


LLAMA = Design(
    "reference-llama",
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 168,
        "intermediate_size": 440,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
    Vocabulary(size=789, bos="<|begin_of_text|>", eos="<|end_of_text|>"),
    LLAMA3,
)
"""Six heads of 32 over a hidden size of 168, two key-value heads, untied: no two of its sizes are equal."""

GPT2 = Design(
    "reference-gpt2",
    {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 150,
        "n_layer": 4,
        "n_head": 5,
        "n_positions": 256,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": True,
    },
    Vocabulary(size=811, bos=None, eos="<|endoftext|>"),
    CHATML,
)
"""Five heads of 30, learned positions, Conv1D layers, a tied head, and a tokenizer without a begin-of-text token."""

DESIGNS = (LLAMA, GPT2)


def build(design: Design, folder: Path) -> None:
    """Train the tokenizer and the model of `design` and write them into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    words = design.vocabulary
    templates = {
        name: ChatTemplate(source, words.control_tokens, bos=words.bos or "", eos=words.eos)
        for name, source in CATALOG.items()
    }
    rendered = [_rendered(text, templates).text for text in _texts("vocabulary", _TEXTS_PER_VOCABULARY)]
    build_tokenizer(words, rendered + list(WORDS) * _WORD_REPEATS, folder)
    write_text(folder / "chat_template.jinja", design.template.jinja)
    tokenizer = FileTokenizer(folder)
    config = dict(design.config) | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    backend = open_backend("torch")
    backend.create(config, folder, SEED)
    session = backend.open(ModelLocation(design.name, folder, "local"), "float32", tokenizer.pad_id)
    session.attach(None, SEED)
    session.prepare_updates(Optimization(weight_decay=0.01, max_grad_norm=1.0, betas=(0.9, 0.98)))
    plan = LoopPlan(STEPS, 1, 2e-3, 50, "cosine", STEPS)

    def batches_of(epoch: int) -> Sequence[Batch]:
        rows = [_tokenized(text, templates, tokenizer) for text in _texts(f"epoch-{epoch}", _TEXTS_PER_EPOCH)]
        return epoch_batches(rows, _BATCH_SIZE, seed=SEED, epoch=epoch)

    for event in train(session, batches_of, [], plan):
        if isinstance(event, StepDone) and event.step % 100 == 0:
            print(f"{design.name} step {event.step}/{STEPS} loss {event.loss:.3f}", file=sys.stderr, flush=True)
    session.save_model(folder)
    write_stops(design, folder)


def write_stops(design: Design, folder: Path) -> None:
    """Write `generation_config.json`: the model stops at the end of text and at the end of a turn in any format."""
    tokenizer = FileTokenizer(folder)
    stops = [tokenizer.control_id(token) for token in (design.vocabulary.eos, "<|im_end|>", "<|eot_id|>")]
    settings = {"eos_token_id": stops, "pad_token_id": tokenizer.pad_id}
    if tokenizer.bos_id is not None:
        settings["bos_token_id"] = tokenizer.bos_id
    write_json(folder / "generation_config.json", settings)


def _texts(name: str, count: int) -> list[Text]:
    rng = random.Random(f"{SEED}-{name}")
    return [draw_text(rng) for _ in range(count)]


def _rendered(text: Text, templates: Mapping[str, ChatTemplate]) -> Rendered:
    if isinstance(text, Document):
        return templates["alpaca"].render_document(text)
    name, conversation = text
    return templates[name].render(conversation)


def _tokenized(text: Text, templates: Mapping[str, ChatTemplate], tokenizer: FileTokenizer) -> TokenizedRow:
    row = encode_row(_rendered(text, templates), tokenizer)
    return TokenizedRow(row.ids, (True,) * len(row.ids), row.where)


def main() -> None:
    """Build both models, their cards and the shipped data sets."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, default=SHIPPED_FOLDER, help="where the model folders go")
    parser.add_argument("--only", choices=[design.name for design in DESIGNS], help="build one model only")
    arguments = parser.parse_args()
    write_shipped_sets(DATA_FOLDER)
    for design in DESIGNS:
        if arguments.only in (None, design.name):
            build(design, arguments.output / design.name)
            write_card(design.name, arguments.output / design.name)


if __name__ == "__main__":
    main()
