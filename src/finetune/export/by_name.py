"""What llama.cpp makes of tokens by their names alone, whatever a file says of them. Source: `llama-vocab.cpp`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

ENDS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
        # Of a file that is filled in: what pads it, and what stands between files.
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|file_sep|>"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    )
)
"""Control tokens at which an answer ends."""
_FILLED_IN = frozenset(
    (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>"),
        *("<|prefix|>", "<|suffix|>", "<|middle|>"),
    )
)
CONTROL_BY_NAME = ENDS | _FILLED_IN
_SHOWN = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))
"""No control tokens: they are read in any text, and shown."""
_TWO_ENDS = (("<|return|>", "<|call|>"), ("<|calls|>", "<|flush|>"))
"""Where a vocabulary has both of two, its `<|end|>` ends no answer, and is shown."""


def looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes an added token for a control token, though it is not flagged as one."""
    around = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(front) and text.endswith(back) for front, back in around
    )


def _shown(texts: Sequence[str]) -> frozenset[str]:
    two = any(set(pair) <= set(texts) for pair in _TWO_ENDS)
    return _SHOWN | {"<|end|>"} if two else _SHOWN


def end_ids(texts: Sequence[str]) -> list[int]:
    """The ids at which llama.cpp ends an answer, for their names, whatever the file says."""
    ends = ENDS - _shown(texts)
    return [number for number, text in enumerate(texts) if text in ends]


def control_ids(texts: Sequence[str], flagged: Sequence[bool]) -> frozenset[int]:
    """The ids that llama.cpp reads in a text only where it is told to, and does not show."""
    shown = _shown(texts)
    told = zip(texts, flagged, strict=True)
    return frozenset(
        number for number, (text, own) in enumerate(told) if (own or text in CONTROL_BY_NAME) and text not in shown
    )


class LoadedTokenizer:
    """A tokenizer as llama.cpp has it once it has loaded the file: with its own idea of what a control token is.

    Args:
        file: the content of `tokenizer.json`.
        control: the ids that are control tokens to llama.cpp.
        texts: the token of each id.
    """

    def __init__(self, file: Mapping[str, Any], control: frozenset[int], texts: Sequence[str]) -> None:
        from tokenizers import Tokenizer

        added = {token["id"]: token | {"special": token["id"] in control} for token in file["added_tokens"]}
        rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added |= {number: {"id": number, "content": texts[number], **rules} for number in control - added.keys()}
        self._tokenizer = Tokenizer.from_str(
            json.dumps({**file, "added_tokens": [added[key] for key in sorted(added)]})
        )

    def plain(self, text: str) -> list[int]:
        """The ids of a text in which no control token is read."""
        self._tokenizer.encode_special_tokens = True
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def markup(self, text: str) -> list[int]:
        """The ids of a text in which control tokens are read."""
        self._tokenizer.encode_special_tokens = False
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """What llama.cpp shows of the ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
