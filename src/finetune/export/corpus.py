"""Texts on which tokenizers differ: digits, code, space, scripts, emoji, control tokens as plain text."""

import random
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

_WRITTEN = (
    "Hello world",
    " leading",
    "trailing ",
    "  two  spaces   three    ",
    "\n",
    "\n\n\n",
    " \n \n",
    "\t\ttabs\t",
    "\r\n\r\n",
    "a\u00a0b\u3000c\u2028d\u2029e\u200bf\u200df\ufeffg\u180e",
    "don't DON'T I'll WE'VE they're 's'S 'tis ''",
    "x'llama 'redo",
    "1",
    "12",
    "123",
    "1234",
    "1234567890",
    "3.14159 -2e10 0x1F 1,000,000",
    "١٢٣ १२ １２ ⅠⅡ ²³½ ①",
    "def f(x):\n    return x**2  # comment\n\n\nclass A:\n\tpass",
    "if (a&&b||!c){d[0]+=e->f;}//§",
    "<html>&amp;</html>",
    '{"a": [1, null]}',
    "https://example.org/a_b?c=d%20e&f#g",
    "C:\\path\\to\\file",
    "snake_case camelCase SCREAMING_CASE kebab-case",
    "資料庫管理",
    "日本語のテキスト、と。",
    "한국어 조선말",
    "Москва Ёлка",
    "שלום مرحبا",
    "हिन्दी",
    "ไทยภาษา",
    "naïve café cafe\u0301 A\u030a Å ﬁ İiı ßẞ",
    "ǅ ʰ ᾈ",
    "🦙🦙 👨\u200d👩\u200d👧 👍🏽 🇫🇷 ☺\ufe0f",
    "𐍈 𝓐 🧿",
    "▁▁x Ġy Ċ",
    "!!!???...---___***",
    "—–…“quotes”«»",
    "$100 €50 £20 100% #1 @me",
    "a" * 40,
    "ab" * 25,
    " " * 33,
    "\u0007\u001b[0m\u007f",
    "[INST] hi [/INST] <<SYS>> <s> </s> <unk> <pad> <bos> <eos>",
    "<0x0A><0x41>",
    "\\n\\t\\u0041",
)
_POOL = (
    "aeiourstln",
    "AEXZ",
    "0123456789",
    "    \n\t",
    "'.,;:!?-_()[]{}<>|/\\\"`~@#$%^&*+=",
    "éüøłижλΩ",
    "中文あア한",
    "😀🦙",
    "\u0301\u0308\u200d\u00a0\u3000\u2009",
    "१٣Ⅷ¼",
)


def nasty_texts(added: Sequence[str], form: str = "", *, drawn: int = 150) -> list[str]:
    """The texts, the same ones every time.

    Args:
        added: tokens that stand apart from the vocabulary, such as control tokens; they occur in plain text, side by
            side, and where one begins before another has ended.
        form: the Unicode form in which the texts are wanted, or ASCII where no others are.
        drawn: how many are put together at random; some may be the same.
    """
    texts = [*_WRITTEN, *_with_added(added)]
    dice = random.Random(0)
    for _ in range(drawn):
        pools = [dice.choice(_POOL) for _ in range(dice.randint(1, 12))]
        texts.append("".join(dice.choice(pool) for pool in pools for _ in range(dice.randint(1, 4))))
    if form == "ASCII":
        texts = [text for text in texts if text.isascii()]
    elif form:
        texts = [unicodedata.normalize(form, text) for text in texts]  # type: ignore[arg-type]
    return list(dict.fromkeys(texts))


def _with_added(added: Sequence[str]) -> list[str]:
    some = list(added[:64])
    texts = [text for token in some for text in (token, f"a{token}b", f"a {token} b\n{token}\n")]
    texts += [left + right for left, right in pairwise(some)]
    texts += [token[:-1] for token in some] + [token.upper() for token in some]
    for left in some:
        for right in some:
            shared = next(
                (size for size in range(min(len(left), len(right)) - 1, 1, -1) if left.endswith(right[:size])), 0
            )
            texts += [left + right[shared:]] if shared and left != right else []
    return texts
