"""Texts on which tokenizers part: digits, code, space of all kinds, scripts, emoji, control tokens as plain text."""

import random
import unicodedata
from collections.abc import Sequence

_WRITTEN = (
    "Hello world", " leading", "trailing ", "  two  spaces   three    ", "\n", "\n\n\n", " \n \n", "\t\ttabs\t", "\r\n\r\n",
    "a\u00a0b\u3000c\u2028d\u2029e\u200bf\u200df\ufeffg\u180e", "don't DON'T I'll WE'VE they're 's'S 'tis ''", "x'llama 'redo",
    "1", "12", "123", "1234", "1234567890", "3.14159 -2e10 0x1F 1,000,000", "\u0661\u0662\u0663 \u0967\u0968 \uff11\uff12 \u2160\u2161 \u00b2\u00b3\u00bd \u2460",
    "def f(x):\n    return x**2  # comment\n\n\nclass A:\n\tpass", 'if (a&&b||!c){d[0]+=e->f;}//\u00a7', "<html>&amp;</html>", '{"a": [1, null]}',
    "https://example.org/a_b?c=d%20e&f#g", "C:\\path\\to\\file", "snake_case camelCase SCREAMING_CASE kebab-case",
    "\u8cc7\u6599\u5eab\u7ba1\u7406", "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\u3068\u3002", "\ud55c\uad6d\uc5b4 \uc870\uc120\ub9d0", "\u041c\u043e\u0441\u043a\u0432\u0430 \u0401\u043b\u043a\u0430", "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627", "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0e44\u0e17\u0e22\u0e20\u0e32\u0e29\u0e32", "na\u00efve caf\u00e9 cafe\u0301 A\u030a \u00c5 \ufb01 \u0130i\u0131 \u00df\u1e9e", "\u01c5 \u02b0 \u1f88",
    "\U0001f999\U0001f999 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 \u263a\ufe0f", "\U00010348 \U0001d4d0 \U0001f9ff", "\u2581\u2581x \u0120y \u010a",
    "!!!???...---___***", "\u2014\u2013\u2026\u201cquotes\u201d\u00ab\u00bb", "$100 \u20ac50 \u00a320 100% #1 @me", "a" * 40, "ab" * 25, " " * 33, "\x07\x1b[0m\x7f",
    "[INST] hi [/INST] <<SYS>> <s> </s> <unk> <pad> <bos> <eos>", "<0x0A><0x41>", "\\n\\t\\u0041",
)  # fmt: skip
_POOL = (
    "aeiourstln", "AEXZ", "0123456789", "    \n\t", "'.,;:!?-_()[]{}<>|/\\\"`~@#$%^&*+=", "\u00e9\u00fc\u00f8\u0142\u0438\u0436\u03bb\u03a9", "\u4e2d\u6587\u3042\u30a2\ud55c",
    "\U0001f600\U0001f999", "\u0301\u0308\u200d\u00a0\u3000\u2009", "\u0967\u0663\u2167\u00bc",
)  # fmt: skip
_DRAWN = 150


def nasty_texts(added: Sequence[str], form: str = "") -> list[str]:
    """The texts, the same ones every time.

    Args:
        added: tokens that stand apart from the vocabulary, such as control tokens; they occur in plain text, side by
            side, and where one begins before another has ended.
        form: the Unicode form in which the texts are wanted.
    """
    texts = [*_WRITTEN, *_with_added(added)]
    dice = random.Random(0)
    for _ in range(_DRAWN):
        pools = [dice.choice(_POOL) for _ in range(dice.randint(1, 12))]
        texts.append("".join(dice.choice(pool) for pool in pools for _ in range(dice.randint(1, 4))))
    return list(dict.fromkeys(unicodedata.normalize(form, text) if form else text for text in texts))  # type: ignore[arg-type]


def _with_added(added: Sequence[str]) -> list[str]:
    some = list(added[:64])
    texts = [text for token in some for text in (token, f"a{token}b", f"a {token} b\n{token}\n")]
    texts += [left + right for left, right in zip(some, some[1:], strict=False)]
    texts += [token[:-1] for token in some] + [token.upper() for token in some]
    for left in some:
        for right in some:
            shared = next((size for size in range(min(len(left), len(right)) - 1, 1, -1) if left.endswith(right[:size])), 0)
            texts += [left + right[shared:]] if shared and left != right else []
    return texts
