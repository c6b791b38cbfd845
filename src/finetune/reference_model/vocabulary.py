"""Builds the byte-level BPE tokenizers of the shipped models, with GPT-2's pre-tokenizer."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.chat.catalog import CHATML, LLAMA3
from finetune.files import write_json

PAD = "<|pad|>"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """How many tokens, and which of them are control tokens: pad, end of text and end of turn are all distinct."""

    size: int
    bos: str | None
    eos: str

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Every control token, in the order of their ids."""
        opening = (PAD, self.eos) + ((self.bos,) if self.bos else ())
        return opening + CHATML.control_tokens + LLAMA3.control_tokens


def build_tokenizer(vocabulary: Vocabulary, texts: Iterable[str], folder: Path) -> None:
    """Learn the merges from `texts` (control tokens in them are left out) and write the tokenizer's files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = re.compile("|".join(map(re.escape, vocabulary.control_tokens)))
    pieces = (piece for text in texts for piece in control.split(text) if piece)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary.size,
        special_tokens=list(vocabulary.control_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    if vocabulary.bos:
        number = tokenizer.token_to_id(vocabulary.bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{vocabulary.bos} $A", special_tokens=[(vocabulary.bos, number)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": vocabulary.eos,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings | ({"bos_token": vocabulary.bos} if vocabulary.bos else {}))
