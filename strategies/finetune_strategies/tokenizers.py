"""Tokenizer folders: tiny byte-level BPE tokenizers with every arrangement of BOS, padding and control tokens."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from hypothesis import strategies as st

from finetune_strategies.scratch import lasting_folder

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
EOS = "</s>"
PAD = "<|pad|>"

_CORPUS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
    "### Instruction:\nHello world\n\n### Response:\nHello\n\n\n",
    "What is the capital of Norway? Oslo",
    "\n\n\n\n",
    "1234 + 5678 = 6912",
    "user\nassistant\nsystem\n",
    "Москва資料🦙🦙🦙",
    " [/INST] ",
    "({[<|",
    "|>]})",
    ":(:[:\n:\n\n",
    '"""',
)


@dataclass(frozen=True)
class TokenizerKind:
    """How a tokenizer folder is made up.

    `bos`: no such token; one that the tokenizer puts in front (by its post-processor or by its setting); one that
    only templates write; or, as in GPT-2, one that is the end-of-text token as well.
    `pieces`: bytes, as in GPT-2; words after a space that is put before every stretch of text, as in Llama 2
    (`every`), or before a text's beginning (`first`), bytes only for what has no piece.
    `takes`: on which side control tokens take white space with them, as Phi-3's do.
    """

    bos: Literal["none", "processor", "setting", "template", "eos"] = "none"
    pad: Literal["own", "eos", "none"] = "own"
    chatml: bool = True
    llama3: bool = True
    pieces: Literal["bytes", "every", "first"] = "bytes"
    takes: Literal["nothing", "lstrip", "rstrip"] = "nothing"

    @property
    def bos_token(self) -> str:
        """The begin-of-text token, "" when there is none."""
        return {"none": "", "eos": EOS}.get(self.bos, "<s>")

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts the begin-of-text token in front."""
        return self.bos in ("processor", "setting")

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Every control token, in the order of their ids, which start at 0."""
        bos = () if self.bos in ("none", "eos") else (self.bos_token,)
        pad = (PAD,) if self.pad == "own" else ()
        return (EOS, *bos, *pad, *(CHATML_TOKENS if self.chatml else ()), *(LLAMA3_TOKENS if self.llama3 else ()))


KINDS = (
    TokenizerKind("none", "own"),
    TokenizerKind("none", "eos", llama3=False),
    TokenizerKind("processor", "own"),
    TokenizerKind("processor", "eos"),
    TokenizerKind("setting", "none", chatml=False),
    TokenizerKind("setting", "own"),
    TokenizerKind("template", "eos"),
    TokenizerKind("template", "own", chatml=False, llama3=False),
    TokenizerKind("eos", "eos"),
)
SERVED = (
    KINDS[0],
    TokenizerKind("processor", "own", pieces="every"),
    TokenizerKind("processor", "own", pieces="first"),
    TokenizerKind("template", "own", pieces="every", takes="rstrip"),
    TokenizerKind("none", "own", takes="rstrip"),
    TokenizerKind("none", "own", takes="lstrip"),
)
"""One of each way to cut a text into pieces, as the models in use have them."""


def tokenizer_kinds() -> st.SearchStrategy[TokenizerKind]:
    """Arrangements of a tokenizer; `tokenizer_folder` makes the files of one."""
    return st.sampled_from(KINDS)


def all_control_kinds() -> st.SearchStrategy[TokenizerKind]:
    """Arrangements whose tokenizer has the control tokens of every template."""
    return st.sampled_from([kind for kind in KINDS if kind.chatml and kind.llama3])


@cache
def _root() -> Path:
    return lasting_folder("tokenizers")


@cache
def tokenizer_folder(kind: TokenizerKind) -> Path:
    """A folder with tokenizer.json, tokenizer_config.json and config.json; made once a process, never to be changed."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    if kind.pieces == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        prefix: Any = {"every": "always", "first": "first"}[kind.pieces]
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(kind.control_tokens) + 101,
        special_tokens=list(kind.control_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()) if kind.pieces == "bytes" else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in _CORPUS for _ in range(3)], trainer)
    if kind.pieces != "bytes":
        tokenizer = _with_bytes(tokenizer)
    if kind.takes != "nothing":
        rules = {"lstrip": kind.takes == "lstrip", "rstrip": kind.takes == "rstrip"}
        taking = [AddedToken(token, special=True, normalized=False, **rules) for token in kind.control_tokens[1:]]
        tokenizer.add_special_tokens(taking)
    if kind.bos == "processor":
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{kind.bos_token} $A", special_tokens=[(kind.bos_token, tokenizer.token_to_id(kind.bos_token))]
        )
    folder = _root() / str(len(list(_root().iterdir())))
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"eos_token": EOS}
    if kind.bos != "none":
        settings["bos_token"] = kind.bos_token
    if kind.bos == "setting":
        settings["add_bos_token"] = True
    if kind.pad != "none":
        settings["pad_token"] = {"content": PAD, "special": True} if kind.pad == "own" else EOS
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _with_bytes(tokenizer: Any) -> Any:
    """The same tokenizer, which spells what it has no piece for in bytes."""
    described = json.loads(tokenizer.to_str())
    model = described["model"]
    model["vocab"] |= {f"<0x{byte:02X}>": len(model["vocab"]) + byte for byte in range(256)}
    model["byte_fallback"] = True
    return type(tokenizer).from_str(json.dumps(described))
