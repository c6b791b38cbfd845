"""Measures a shipped model and writes its model card; every figure in the card comes from this run."""

from pathlib import Path

from finetune.backends import open_backend
from finetune.chat.encoder import Encoder
from finetune.data.facts import Fact, known_facts
from finetune.data.shipped import FACTS, shipped_facts
from finetune.evidence.answers import ask
from finetune.files import describe_files, write_text
from finetune.models.shape import read_shape
from finetune.ports import Session
from finetune.records import Conversation, Message, ModelLocation, Scores
from finetune.reference_model.corpus import FORMATS

_ANSWER_TOKENS = 12


def score_facts(session: Session, encoder: Encoder, facts: list[Fact]) -> Scores:
    """The session's answers to the facts' questions, asked in the encoder's format."""
    conversations = [Conversation((Message("user", f.question), Message("assistant", f.answer)), "fact") for f in facts]
    questions = [encoder.question(conversation) for conversation in conversations]
    return ask(session, questions, encoder.said, max_new_tokens=_ANSWER_TOKENS, stop_ids=encoder.stop_ids)


def write_card(name: str, folder: Path) -> None:
    """Ask the model everything, in every format, and write `README.md` beside its weights."""
    location = ModelLocation(name, folder, "local")
    shape = read_shape(folder)
    rows = []
    for template in FORMATS:
        encoder = Encoder(location, template)
        session = open_backend("torch").open(location, "float32", encoder.tokenizer.pad_id)
        known, new = (score_facts(session, encoder, facts) for facts in (known_facts(), shipped_facts()[FACTS]))
        rows.append(
            f"| {template} | {known.right} of {len(known.answers)} ({known.share:.0%}) "
            f"| {new.right} of {len(new.answers)} ({new.share:.0%}) |"
        )
    files = [file for file in describe_files(folder) if file["path"] != "README.md"]
    listing = [f"| `{file['path']}` | {file['bytes']:,} | `{file['sha256']}` |" for file in files]
    lines = [
        "---",
        "license: mit",
        "tags: [text-generation, testing]",
        "---",
        f"# {name}",
        "",
        f"A {shape.parameters / 1e6:.2f} M-parameter {shape.architecture} made to be fine-tuned in seconds, so that a",
        "fine-tuning pipeline can be proved right offline. It is a test instrument and knows nothing else.",
        "",
        f"- Hidden size {shape.hidden_size}, {shape.layers} layers, vocabulary {shape.vocab_size}, context "
        f"{shape.context_length} tokens, float32.",
        "- It was pre-trained on half of a small set of facts (capitals, sums, number patterns), on lists of all their",
        "  words, on repetitions, and on made-up pairings stated in the prompt. The fine-tuning facts were left out.",
        f"- It knows the prompt formats {', '.join(FORMATS)}.",
        "- Built by `make reference-model` (`finetune/reference_model/recipe.py`), seed 0.",
        "",
        "Measured when it was built (exact match, greedy):",
        "",
        "| format | facts of its pre-training | facts to fine-tune on |",
        "| --- | --- | --- |",
        *rows,
        "",
        "| file | bytes | SHA-256 |",
        "| --- | --- | --- |",
        *listing,
        "",
    ]
    write_text(folder / "README.md", "\n".join(lines))
