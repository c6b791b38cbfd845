"""What `make fuzz` runs and damages: commands, the files that each reads, and what may be wrong with one."""

import contextlib
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUICK = ("--backend", "reference", "--max-steps", "2", "--rank", "2")
QUICK += tuple(
    word
    for setting in (
        *("evaluation.questions=2", "evaluation.max_new_tokens=2", "judge.control=never", "judge.memory=never"),
        *("tokens.max_length=96", "training.batch_size=2", "training.save_every=1"),
    )
    for word in ("--set", setting)
)
TRAINED = (*QUICK, "--model", "model", "--data", "rows.jsonl")
ON_DATA = ("check", "train", "judge", "evaluate")
COMMANDS: dict[str, tuple[str, ...]] = {
    "check": ("check", *TRAINED),
    "estimate": ("estimate", *TRAINED),
    "train": ("train", *TRAINED, "--output", "made"),
    "resume": ("train", "--resume", "half"),
    "longer": ("train", "--resume", "run", "--max-steps", "3"),
    "config": ("check", "finetune.yaml"),
    "config estimate": ("estimate", "finetune.yaml"),
    "config train": ("train", "finetune.yaml", "--output", "made"),
    "template": ("check", *TRAINED, "--template", "template.jinja"),
    "report": ("report", "run"),
    "page": ("report", "run", "--verbose", "--html", "page.html"),
    "report json": ("report", "run", "--json"),
    "runs": ("runs", "."),
    "history": ("report", "--history", "history.jsonl", "--html", "page.html"),
    "chat": ("chat", "run", "--prompt", "hello", "--max-new-tokens", "2"),
    "tools": ("chat", "run", "--prompt", "hello", "--tools", "tools.json"),
    "messages": ("chat", "run", "--messages", "messages.json", "--max-new-tokens", "2"),
    "evaluate": ("evaluate", "run", "--data", "other.jsonl"),
    "judge": (
        "judge",
        "--tuned",
        "run/adapter",
        "--train",
        "rows.jsonl",
        "--base",
        "model",
        "--set",
        "adapter.rank=2",
        "--set",
        "backend=reference",
    ),
    "merge": ("merge", "run"),
    "export": ("export", "run"),
    "compare": ("compare", "run", "--through", "merged"),
    "push": ("push", "run", "me/mine", "--check-only", "--force"),
    "import": ("import", "model.gguf", "imported"),
    "gguf": ("check", *QUICK, "--model", "model.gguf", "--data", "rows.jsonl"),
    "replay": ("replay", "finding.json", "--subject", "reference"),
    "subject": ("verify", "--subject", "subject.toml", "--law", "mask.answers"),
    "baseline": ("verify", "--subject", "reference", "--law", "config.rows", "--baseline", "known.json"),
}
SOUND: dict[str, tuple[str, ...]] = {
    **COMMANDS,
    "init": ("init", "begun"),
    "tracked": ("train", *TRAINED, "--output", "tracked", "--set", "tracking.to=[mlflow]"),
    "deploy": ("deploy", "run", "--name", "mine"),
    "push away": ("push", "run", "me/mine", "--force"),
    "verify": (*("verify", "--subject", "reference", "--law", "config.rows"), "--junit", "j.xml", "--sarif", "s.sarif"),
    "model by address": ("check", "--model", "https://me:{secret}@host.invalid/model?token={secret}"),
    "data by address": ("check", "--data", "https://me:{secret}@host.invalid/rows.jsonl?token={secret}"),
    "train by address": ("train", *QUICK, "--data", "https://me:{secret}@host.invalid/rows.jsonl", "--output", "other"),
}
"""Commands that nothing is damaged for; `{secret}` is one that a user types."""
READ: dict[str, tuple[str, ...]] = {
    "model/*": ("check", "estimate", "train", "chat", "judge", "resume", "evaluate", "export", "merge"),
    "rows.jsonl": ("check", "train", "resume", "longer", "judge", "evaluate"),
    "other.jsonl": ("evaluate",),
    "table.csv": ("check", "train"),
    "table.parquet": ("check", "train"),
    "list.json": ("check", "train"),
    "packed.jsonl.gz": ("check", "train"),
    "finetune.yaml": ("config", "config estimate", "config train"),
    "template.jinja": ("template",),
    "run/**/*": (
        *("report", "page", "report json", "runs", "chat", "evaluate", "merge", "export", "compare", "push", "longer"),
        "judge",
    ),
    "half/**/*": ("resume", "page", "runs"),
    "history.jsonl": ("history",),
    "tools.json": ("tools",),
    "messages.json": ("messages",),
    "model.gguf": ("import", "gguf"),
    "finding.json": ("replay",),
    "subject.toml": ("subject",),
    "known.json": ("baseline",),
}
"""Files, and the commands that read them."""
SETTINGS = (
    "training.learning_rate",
    "adapter.rank",
    "adapter.rank_pattern",
    "data.limit",
    "tokens.max_length",
    "template.name",
)
VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MPLBACKEND", "OLLAMA_HOST", "FT_BACKEND", "HF_HOME")
VARIABLES += ("FT_TRAINING__EPOCHS", "FT_ADAPTER__RANK_PATTERN", "COLUMNS", "TERM", "LC_ALL", "TMPDIR", "NO_COLOR")
VARIABLES += ("XDG_CACHE_HOME", "HF_ENDPOINT", "HTTPS_PROXY", "OMP_NUM_THREADS", "SOURCE_DATE_EPOCH", "FORCE_COLOR")
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
SUBJECT = """
name = "mine"
version = ["true"]
checkpoints = 'step-(?P<step>[0-9]+)'
told = { line = 'loss (?P<loss>[0-9.]+)' }
refuses = [2]
[settings]
"training.learning_rate" = 0.1
[environment]
A = "1"
[train]
argv = ["false", "{model}", "{data}", "{output}", "{settings.training.learning_rate}"]
seconds = 5
"""
BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("bcdefghi", "cdefghij", strict=True)
).replace("a: &a", "b: &b", 1)
NUMBERS = (
    "1" + "0" * 400,
    "-1" + "0" * 400,
    "1e308",
    "-1e308",
    "1e999",
    "NaN",
    "Infinity",
    "9" * 6000,
    "0",
    "-1",
    "1e-320",
)
WORDS = ("\x1b[2J\x07", "\u202e\u2066", "\ud800", "", "x" * 100_000, "/" + "p/" * 3000, "../" * 9 + "outside/mine")
WORDS += ("\0", "(([a-z0-9._]+)+)+X", "a{1000000000000}", "{{ 'a' * 9000000 }}", "/dev/zero", "outside", "~", "%s%n")
WORDS += ("http://127.0.0.1:1/x", "!!python/object/apply:os.system ['touch ../executed']", "1" + "0" * 400)
TEMPLATES = (
    "{{ '\\ud800' }}",
    "{% for n in range(10**9) %}x{% endfor %}",
    "{{ 'x' * (messages|length * 900000) }}",
    "{{ messages.__class__.__mro__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('\x1b[2J') }}",
    "{{ 9**9**9 }}",
    "{% include '/etc/passwd' %}",
    "{% set x = [1] %}{{ x.append(x) or x|tojson }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ messages|batch(1)|list|string * 99999999 }}",
)


@dataclass(frozen=True)
class Case:
    """What is run, in which surroundings, and what was damaged, in words."""

    words: tuple[str, ...]
    environment: dict[str, str]
    told: str


def make_case(seed: int, number: int, place: Path, read: Sequence[str] = ()) -> Case:
    """Damage the sound files of a place as this seed and number decide, or these alone; what then reads them."""
    dice = random.Random(f"{seed}/{number}")
    kind = "file" if read else dice.choices(("file", "variable", "argument"), (18, 1, 1))[0]
    if kind == "variable":
        name, value = dice.choice(VARIABLES), dice.choice((*NUMBERS, *WORDS)).replace("\0", "")[:5000]
        value = value.encode("utf-8", "replace").decode()
        return Case(COMMANDS[dice.choice(tuple(COMMANDS))], {name: value}, f"{name}={value[:60]!r}")
    if kind == "argument":
        words = list(COMMANDS[dice.choice(tuple(COMMANDS))])
        at = dice.randrange(1, len(words))
        words[at] = dice.choice((*NUMBERS, *WORDS)).replace("\0", "")
        if "=" in COMMANDS["train"][at % len(COMMANDS["train"])] and dice.random() < 0.5:
            words[at] = f"{dice.choice(SETTINGS)}={words[at]}"
        return Case(tuple(words), {}, f"argument {at} is {words[at][:60]!r}")
    pattern = dice.choice(tuple(read or READ))
    files = sorted(file for file in place.glob(pattern) if file.is_file())
    name = dice.choice(READ[pattern])
    words = list(COMMANDS[name])
    if pattern in ("table.csv", "table.parquet", "list.json", "packed.jsonl.gz"):
        words[words.index("rows.jsonl")] = pattern
    if not files:
        return Case(tuple(words), {}, f"no {pattern}")
    path = dice.choice(files)
    told = damage(dice, path)
    if path.is_relative_to(place / "run") and dice.random() < 0.5 and fit_hashes(place / "run", path):
        told += ", and its hash was made to fit"
    return Case(tuple(words), {}, f"{path.relative_to(place)}: {told}")


def damage(dice: random.Random, path: Path) -> str:
    """Do one thing to a file, or several of one kind; what it was."""
    content = path.read_bytes()
    text = path.suffix in (".json", ".jsonl", ".yaml", ".toml", ".jinja", ".csv", ".txt", ".md", ".html")
    ways = [_as_bytes, _as_bytes, _as_no_file]
    if text and path.suffix in (".json", ".jsonl"):
        ways = [_as_json] * 9 + ways
    elif path.suffix in (".yaml", ".toml"):
        ways = [_as_settings] * 6 + ways
    elif path.suffix == ".jinja":
        ways = [_as_template] * 6 + ways
    elif path.suffix in (".safetensors", ".gguf"):
        ways = [_as_header] * 4 + ways
    return dice.choice(ways)(dice, path, content)


def _as_bytes(dice: random.Random, path: Path, content: bytes) -> str:
    """Bits that tipped, a file that was cut off, or one of something else."""
    at = dice.randrange(len(content) + 1)
    kind = dice.choice(("flip", "flip", "cut off", "inserted", "twice", "other"))
    if kind == "flip":
        changed = bytearray(content)
        for _ in range(dice.choice((1, 1, 3, 20))):
            if changed:
                changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
        path.write_bytes(bytes(changed))
    elif kind == "cut off":
        path.write_bytes(content[:at])
    elif kind == "inserted":
        more = dice.choice(
            (b"\0", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"\x1b[2J", b"9" * 5000, b"\n" * 999)
        )
        path.write_bytes(content[:at] + more + content[at:])
    elif kind == "twice":
        path.write_bytes(content + content[at:])
    else:
        path.write_bytes(
            dice.choice((b"", b"null", b"[]", b"{}", b"3", b'"x"', b"\x80\x04N.", dice.randbytes(999), b"[" * 99_999))
        )
    return kind


def _as_no_file(dice: random.Random, path: Path, content: bytes) -> str:
    """What is no file, or leads elsewhere, or is far too large."""
    path.unlink()
    kind = dice.choice(("nothing", "folder", "pipe", "/dev/zero", "../outside/mine", "huge", "itself"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.write(content)
            file.truncate(5 * 10**9)
    elif kind != "nothing":
        outside = next(each for each in path.parents if (each / "outside").is_dir()) / "outside/mine"
        path.symlink_to({"itself": path.name, "../outside/mine": str(outside)}.get(kind, kind))
    return kind


def _as_json(dice: random.Random, path: Path, content: bytes) -> str:
    """A value of another type or size, a key that is gone, or a list without end, in one or a few places."""
    lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
    at = dice.randrange(len(lines))
    value = json.loads(lines[at])
    told = []
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        places = list(_places(value))
        if not places:
            break
        owner, key = dice.choice(places)
        if dice.random() < 0.15:
            told.append(f"{key} gone")
            del owner[key]
            continue
        other = _other(dice, owner[key])
        told.append(f"{key} is {str(other)[:40]!r}")
        owner[key] = other
    text = json.dumps(value)
    # What no value of Python's can be is written by its place.
    text = re.sub(r'"@number ([^"]*)"', r"\1", text)
    lines[at] = text.replace('"@deep"', "[" * 30_000 + "]" * 30_000)
    path.write_text("\n".join(lines) + "\n")
    return ", ".join(told)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a value, of long lists the first few."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 5)) if isinstance(value, list) else ()
    for key in list(keys)[:40]:
        yield value, key
        yield from _places(value[key])


def _other(dice: random.Random, value: Any) -> Any:
    kind = dice.choice(("number", "number", "word", "plain", "plain", "wrapped", "deep", "many"))
    if kind == "number":
        return f"@number {dice.choice(NUMBERS)}"
    if kind == "word":
        return dice.choice(WORDS)
    if kind == "wrapped":
        return dice.choice(([value], {"a": value}, [value] * 3, [], {}))
    if kind == "many":
        return dice.choice(([value] * 20_000, {str(n): value for n in range(5000)})) if len(str(value)) < 99 else None
    return (
        "@deep" if kind == "deep" else dice.choice((None, True, False, 0, -1, 1.5, 10**9, 2**63, "x", [], {}, [None]))
    )


def _as_settings(dice: random.Random, path: Path, content: bytes) -> str:
    """A line whose value is another one, a key nobody knows, or a document that grows when it is read."""
    lines = content.decode().splitlines()
    bomb = BOMB if path.suffix == ".yaml" else "a = " + "[" * 20_000 + "]" * 20_000
    deep = "a: " + "[" * 20_000 if path.suffix == ".yaml" else ".".join("a" * 9999) + " = 1"
    if dice.random() < 0.2:
        more = dice.choice((bomb, deep, f"{dice.choice(WORDS)!r}: 1", "training: 3", "[train]"))
        path.write_bytes("\n".join([*lines, more, ""]).encode("utf-8", "surrogatepass"))
        return f"and {more[:40]!r}"
    at = dice.randrange(len(lines))
    sign = ":" if path.suffix == ".yaml" else "="
    key, _, _ = lines[at].partition(sign)
    other = dice.choice(
        (*NUMBERS, *map(json.dumps, WORDS), "[]", "{}", "null", "[[[[]]]]", "*a", "&a [*a]", "!!set {a}", "yes")
    )
    lines[at] = f"{key}{sign} {other}"
    path.write_bytes("\n".join([*lines, ""]).encode("utf-8", "surrogatepass"))
    return f"{key.strip()} is {other[:40]!r}"


def _as_template(dice: random.Random, path: Path, content: bytes) -> str:
    text = dice.choice(TEMPLATES)
    path.write_bytes((text + content.decode() * dice.randrange(2)).encode())
    return text[:40]


def _as_header(dice: random.Random, path: Path, content: bytes) -> str:
    """A number, or a word, near the beginning, where formats say what follows."""
    changed = bytearray(content)
    at = dice.randrange(min(len(content), 4000))
    if dice.random() < 0.5:
        at = dice.choice((0, 8, 16, 24))
    more = dice.choice(
        (b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"\0" * 4 + b"\1" + b"\0" * 3, dice.randbytes(4), b"99999999")
    )
    changed[at : at + len(more)] = more
    path.write_bytes(bytes(changed))
    return f"{more!r} at {at}"


def fit_hashes(run: Path, path: Path) -> bool:
    """Have a run's record say of a damaged file what is true of it, as a stranger's would; whether it named it."""
    from finetune.files import describe_file

    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((run / "run.json").read_text())
        name = path.relative_to(run).as_posix()
        for place, each in enumerate(record["artifacts"]):
            if each["path"] == name and path.stat().st_size < 10**8:
                record["artifacts"][place] |= describe_file(path, name=name)
                (run / "run.json").write_text(json.dumps(record))
                return True
    return False
