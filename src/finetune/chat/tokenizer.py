"""Loads a model's own tokenizer from its folder, without any ML framework."""

import copy
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache, wraps
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from finetune.errors import ModelError
from finetune.files import file_hash
from finetune.reading import check_regular, read_json, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer


P = ParamSpec("P")
R = TypeVar("R")
Spans = tuple[list[int], Callable[[int], tuple[int, int]]]
"""Ids, and for the place of each the (start, end) characters that it covers."""

_BEFORE = ("\n", "]", ":", ">", "a", "。")
"""What a text may be put after, so that it is no beginning: the first that none of its characters merges with."""


_KEPT, _LONG = 256, 10_000
"""Of so many stretches of markup it is kept what control tokens they hold, since templates repeat themselves; none of
so many characters is."""


def _usable(method: Callable[P, R]) -> Callable[P, R]:
    """A method that tells of a file that can be read and not be used: the library panics, or raises bare Exception."""

    @wraps(method)
    def told(*given: P.args, **named: P.kwargs) -> R:
        try:
            return method(*given, **named)
        except BaseException as error:
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            what = f"{getattr(given[0], 'folder', '')}: the tokenizer's file can be read and not be used: {error}"
            raise ModelError(what, hint="get the model again") from None

    return told


class FileTokenizer:
    """The tokenizer of one model folder: `tokenizer.json` (or `vocab.json` + `merges.txt`) and its settings.

    Control tokens are the special ones, those that the chat template writes (`for_template`), and those that are to be
    `learned`. They are recognised in markup only: in somebody's text they stay ordinary characters.
    """

    def __init__(self, folder: Path, learned: Sequence[str] = ()) -> None:
        self.folder = folder
        self.learned = tuple(learned)
        settings = _read_json(folder / "tokenizer_config.json")
        model = _read_json(folder / "config.json")
        found = (folder / name for name in _FILES)
        self._file = _open(folder, tuple(file_hash(path) if path.is_file() else "" for path in found))
        self._added = self._file.added
        # Where the settings say that there is no begin-of-text token, the model's id for one is not asked.
        none = "bos_token" in settings and settings["bos_token"] is None
        self.bos = "" if none else _token_text(settings.get("bos_token"), self._file.rust, model.get("bos_token_id"))
        self.eos = _token_text(settings.get("eos_token"), self._file.rust, model.get("eos_token_id"))
        if not self.eos:
            raise ModelError(f"{folder}: the tokenizer has no end-of-text token", hint="set eos_token in its config")
        pad = _token_text(settings.get("pad_token"), self._file.rust, model.get("pad_token_id"))
        self.eos_id = self._known(self.eos)
        self.bos_id = self._known(self.bos) if self.bos else None
        self.pad_id = self._known(pad) if pad else self.eos_id
        self.adds_bos = self.prepends_bos(settings)
        self.chat_template = _chat_template(folder, settings)
        generation = _read_json(folder / "generation_config.json").get("eos_token_id", [])
        extra = generation if isinstance(generation, list) else [] if generation is None else [generation]
        if odd := [each for each in extra if not _is_id(each)]:
            raise ModelError(
                f"{folder}/generation_config.json: eos_token_id has {str(odd[0])[:40]!r}, which is no token's id",
                hint="name the ids of the tokens that end an answer, or leave it out",
            )
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([self.eos_id, *extra]))
        if missing := [token for token in self.learned if token not in self._added]:
            raise ModelError(
                f"{folder}: the tokenizer lacks {missing[0]!r}, which is to be learned",
                hint="give `ft train` the model that it was to be added to",
            )
        self._take_control([text for text, token in self._added.items() if token.special or text in self.learned])

    @property
    def learned_ids(self) -> tuple[int, ...]:
        """The ids of the tokens that are to be learned."""
        return tuple(map(self._known, self.learned))

    @property
    def added(self) -> Collection[str]:
        """The tokens that stand apart from the vocabulary."""
        return self._added.keys()

    def added_id(self, token: str) -> int | None:
        """The id of a token that stands apart from the vocabulary; None where there is no such token."""
        return self._known(token) if token in self._added else None

    def has_word(self, text: str) -> bool:
        """Whether a text is a word of the vocabulary."""
        return self._file.rust.token_to_id(text) is not None

    def for_template(self, source: str) -> "FileTokenizer":
        """The same tokenizer, for which every added token that this template writes is a control token, too."""
        # Line ends, which Gemma has among its added tokens, mark nothing.
        new = (token for token in self._added if token.strip() and token not in self.control_tokens)
        written = [token for token in new if token in source]
        if not written:
            return self
        other = copy.copy(self)
        other._take_control([*self.control_tokens, *written])
        return other

    def _take_control(self, tokens: Sequence[str]) -> None:
        self.control_tokens: tuple[str, ...] = tuple(tokens)
        ordered = sorted(tokens, key=len, reverse=True)
        self._splitter = re.compile("|".join(map(re.escape, ordered)) if ordered else "(?!)")
        self._kept: ContentTokenizer | None = None
        self._named: dict[str, tuple[str, tuple[int, ...]]] = {}

    @property
    def _texts(self) -> "ContentTokenizer":
        """How texts are encoded; made when the first is, since until then a template may bring more control tokens."""
        if self._kept is None:
            self._kept = self._file.texts(self.control_tokens)
        return self._kept

    @_usable
    def encode_markup(self, text: str) -> list[int]:
        """Ids of template text: control tokens in it become their ids."""
        return list(self._file.markup().encode(text, add_special_tokens=False).ids)

    @_usable
    def encode_content(self, text: str) -> list[int]:
        """Ids of somebody's text: what looks like a control token stays ordinary text."""
        return list(self._texts.content().encode(text, add_special_tokens=False).ids)

    def by_name(self, text: str) -> tuple[str, tuple[int, ...]]:
        """Markup for `encode_spans`, with its control tokens by other names, and where each of them begins."""
        known = self._named.get(text)
        if known is None:
            pieces = self.split_control(text)
            pieces[1::2] = map(self._texts.names.__getitem__, pieces[1::2])
            begins = list(accumulate(map(len, pieces)))[::2]
            known = "".join(pieces), tuple(begins[:-1])
            if len(text) < _LONG:
                if len(self._named) == _KEPT:
                    self._named.clear()
                self._named[text] = known
        return known

    def meant(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """The places in ids of `encode_spans` where a control token is meant, and its id."""
        meant, least = self._texts.meant, self._texts.least
        return [(place, meant[number]) for place, number in enumerate(ids) if number >= least]

    @_usable
    def encode_spans(self, texts: Sequence[str]) -> list[Spans]:
        """The ids of each text, all texts at once on all cores; see `name_of`."""
        encodings = self._texts.content().encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.token_to_chars) for encoding in encodings]

    @_usable
    def encode_rest(self, text: str) -> Spans:
        """As `encode_spans` of one text that goes on: without the space that some tokenizers put before a beginning."""
        content = self._texts.content()
        if content.encode("a", add_special_tokens=False).tokens[0][0] in "▁Ġ":
            for before in _BEFORE:
                found = content.encode(before + text, add_special_tokens=False)
                first = sum(end <= 1 for _, end in found.offsets)
                if found.ids[:first] == content.encode(before, add_special_tokens=False).ids:
                    spans = [(start - 1, end - 1) for start, end in found.offsets[first:]]
                    return found.ids[first:], spans.__getitem__
        return self.encode_spans([text])[0]

    def split_control(self, text: str) -> list[str]:
        """Markup cut at its control tokens: even places are ordinary text, odd places control tokens."""
        pieces: list[str] = []
        end = 0
        for found in self._splitter.finditer(text):
            pieces += [text[end : found.start()], found.group()]
            end = found.end()
        return [*pieces, text[end:]]

    @_usable
    def decode(self, ids: Sequence[int], *, control: bool = False) -> str:
        """The text of the ids, control tokens left out, or else by their names."""
        special = () if control else self._file.special
        return str(
            self._file.rust.decode([number for number in ids if number not in special], skip_special_tokens=False)
        )

    def without_special(self, text: str) -> str:
        """A text that names control tokens as a server shows it, which leaves out those that are special."""
        return self._splitter.sub(lambda found: "" if self._added[found.group()].special else found.group(), text)

    def reader(self) -> Callable[[int], str | None]:
        """A function that takes ids one by one and says what text each adds; None while a letter is not whole."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        return lambda number: stream.step(self._file.rust, number)

    def word(self, number: int) -> str:
        """The token of an id, as the vocabulary has it."""
        return str(self._file.rust.id_to_token(number))

    def control_id(self, token: str) -> int | None:
        """The id of a control token, or None when the tokenizer has no such token."""
        return self._file.rust.token_to_id(token) if token in self.control_tokens else None

    def __len__(self) -> int:
        return self._file.size

    def description(self) -> dict[str, Any]:
        """What `tokenizer.json` says, also of a tokenizer that came without one."""
        return self._file.description()

    def identity(self) -> str:
        """A hash that two tokenizers share only when they make the same ids of every text."""
        import tokenizers

        parts = (
            tokenizers.__version__,
            json.dumps(self.description()),
            self.control_tokens,
            self.adds_bos,
            self.bos_id,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _known(self, token: str) -> int:
        number = self._file.rust.token_to_id(token)
        if number is None:
            raise ModelError(f"{self.folder}: token {token!r} is named in the settings but not in the vocabulary")
        return int(number)

    @_usable
    def prepends_bos(self, settings: dict[str, object]) -> bool:
        """Whether this tokenizer puts a begin-of-text token in front of a text by itself."""
        prepends = self._file.markup().encode("a").ids[:1] == [self.bos_id] or settings.get("add_bos_token") is True
        return self.bos_id is not None and prepends


class _File:
    """A tokenizer as its files have it, read once, whoever opens that folder.

    It reads markup and texts: which of both it does, `markup` and `ContentTokenizer.content` choose at each call.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.rust = folder, _load(folder)
        decoder = self.rust.get_added_tokens_decoder()
        self.added = {token.content: token for token in decoder.values()}
        self.special = frozenset(number for number, token in decoder.items() if token.special)
        self.size = int(self.rust.get_vocab_size())
        self._last: ContentTokenizer | None = None

    def markup(self) -> "RustTokenizer":
        """It, so set that control tokens become their ids."""
        self.rust.encode_special_tokens = False
        return self.rust

    def texts(self, control: tuple[str, ...]) -> "ContentTokenizer":
        """It, for texts beside these control tokens; for others it is read again."""
        if self._last is None:
            self._last = ContentTokenizer(self, self.rust, control)
        elif self._last.control != control:
            self._last = ContentTokenizer(self, _load(self.folder), control)
        return self._last

    def description(self) -> dict[str, Any]:
        """What `tokenizer.json` says."""
        told: dict[str, Any] = json.loads(self.rust.to_str())
        known = [token for token in told["added_tokens"] if token["content"] in self.added]
        told["added_tokens"] = [token | {"special": self.added[token["content"]].special} for token in known]
        return told


class ContentTokenizer:
    """A tokenizer of texts, to which control tokens are ordinary text.

    One that is meant goes by another name, which nobody can have written, and keeps the token's rules: what white space
    it takes with it, and the like.
    """

    def __init__(self, file: _File, rust: "RustTokenizer", control: tuple[str, ...]) -> None:
        from tokenizers import AddedToken

        self.control, self._rust = control, rust
        secret = secrets.token_hex(8)
        self.names = {token: f"\U0010fffd{secret}{place}\U0010fffd" for place, token in enumerate(control)}
        rules = {
            token: {
                rule: getattr(file.added[token], rule) for rule in ("single_word", "lstrip", "rstrip", "normalized")
            }
            for token in control
        }
        rust.add_special_tokens([AddedToken(token, special=True, **rules[token]) for token in control])
        rust.add_tokens([AddedToken(name, special=False, **rules[token]) for token, name in self.names.items()])
        self.meant = {rust.token_to_id(name): int(rust.token_to_id(token)) for token, name in self.names.items()}
        # Names were added last, so their ids are the highest.
        self.least = min(self.meant, default=int(rust.get_vocab_size()))

    def content(self) -> "RustTokenizer":
        """It, so set that control tokens are text."""
        self._rust.encode_special_tokens = True
        return self._rust


_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
"""What a tokenizer is read from; it is read again where one of them is another."""


@lru_cache(maxsize=2)  # a run's folder and its base's
def _open(folder: Path, hashes: tuple[str, ...]) -> _File:
    return _File(folder)


def _load(folder: Path) -> "RustTokenizer":
    from tokenizers import Tokenizer

    fast, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if not fast.exists() and not (vocabulary.exists() and merges.exists()):
        raise ModelError(
            f"{folder} has no tokenizer.json (nor vocab.json and merges.txt)",
            hint="convert the tokenizer once: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    try:
        for file in (fast,) if fast.exists() else (vocabulary, merges):
            check_regular(file)
        loaded = Tokenizer.from_file(str(fast)) if fast.exists() else _from_merges(folder, vocabulary, merges)
    except Exception as error:  # the library raises bare Exception for a broken file
        raise ModelError(f"{folder}: the tokenizer cannot be read: {error}", hint="get the model again") from None
    # A tokenizer.json may carry somebody's old length limit, which would cut every row without a word.
    loaded.no_truncation()
    loaded.no_padding()
    return loaded


def _from_merges(folder: Path, vocabulary: Path, merges: Path) -> "RustTokenizer":
    from tokenizers import AddedToken, ByteLevelBPETokenizer

    built = ByteLevelBPETokenizer.from_file(str(vocabulary), str(merges))
    settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    marks = [settings.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")]
    texts = [mark.get("content") if isinstance(mark, dict) else mark for mark in marks] + ["<|endoftext|>"]
    known = [text for text in dict.fromkeys(texts) if text and built.token_to_id(text) is not None]
    built.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in known])
    tokenizer: RustTokenizer = built._tokenizer
    return tokenizer


def _token_text(value: object, tokenizer: "RustTokenizer", fallback_id: object) -> str:
    if isinstance(value, dict):
        value = value.get("content")
    if isinstance(value, str) and value:
        return value
    if isinstance(fallback_id, list):
        fallback_id = fallback_id[0] if fallback_id else None
    return str(tokenizer.id_to_token(fallback_id) or "") if _is_id(fallback_id) else ""


def _is_id(value: object) -> bool:
    """Whether a value can be a token's id, as the tokenizer's library takes them."""
    return type(value) is int and 0 <= value < 2**32


def _chat_template(folder: Path, settings: dict[str, object]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return read_text(file)
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} cannot be read: {error}", hint="get the model again") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint="get the model again") from None
    return value if isinstance(value, dict) else {}
