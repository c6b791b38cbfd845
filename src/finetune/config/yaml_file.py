"""Read a YAML configuration file safely, remembering the line each setting stands on."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import Problem
from finetune.files import nearest_file
from finetune.reading import read_bytes

_LARGEST_FILE = 2**18
# The parser raises YAMLError; the constructors of odd values (`!!int x`, `!!bool x`, deep nesting) raise the others.
_REFUSALS = (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
_TIMESTAMP, _MERGE, _TEXT = (f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "merge", "str"))
_MOST_MERGED, _LONGEST_NUMBER = 10_000, 400


@dataclass(frozen=True)
class YamlFile:
    """What a configuration file says: nested values, the line of each dotted key, and what is wrong with the file."""

    path: Path
    values: dict[Any, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    text: str = ""

    def place(self, key: str) -> str:
        """Where a dotted key stands: `config.yaml:12 training.learning_rate`."""
        line = self.lines.get(key, self.lines.get(key.partition(".")[0]))  # `template: chatml` stands on its section's
        return f"{self.path} {key}" if line is None else f"{self.path}:{line} {key}"


class ConfigLoader(yaml.SafeLoader):
    """YAML's safe loader with dates left as text."""

    # Built anew so that nobody else's loader changes; a date-like branch name stays the text it is.
    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML reads it off the class
        first: [entry for entry in resolvers if entry[0] != _TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Bring in what `<<` names, as long as that does not become more and more of the same."""
        for key, value in list(node.value):
            if key.tag == _MERGE:
                parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
                parts = [part for part in parts if isinstance(part, yaml.MappingNode)]
                for part in {id(part): part for part in parts}.values():
                    self.flatten_mapping(part)
                self._merged += sum(len(part.value) for part in parts)
                if self._merged > _MOST_MERGED:
                    what = f"merges (<<) bring in more than {_MOST_MERGED:,} values"
                    raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
        super().flatten_mapping(node)

    def construct_scalar(self, node: yaml.Node) -> Any:
        """The text of a scalar; a number of no end of digits would take as long to read as it is long, squared."""
        if node.tag != _TEXT and len(str(node.value)) > _LONGEST_NUMBER:
            what = f"a value of {len(node.value):,} characters is no number that can be meant"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        return super().construct_scalar(node)  # type: ignore[arg-type]


def yaml_values(text: str) -> Any:
    """The plain values in a YAML text from elsewhere, such as the head of a model card.

    Raises:
        ValueError: it is no YAML, holds what is no plain value, or merges without end.
    """
    try:
        return ConfigLoader(text).get_single_data()
    except _REFUSALS as error:
        raise ValueError(str(error).partition("\n")[0]) from None


def read_yaml(path: Path) -> YamlFile:
    """Read a configuration file; whatever is wrong with it comes back as problems, never as an exception."""
    text, problem = _read_text(path)
    problem = problem or _data_problem(path, text)
    if problem:
        return YamlFile(path, problems=[problem])
    try:
        loader = ConfigLoader(text)
        node = loader.get_single_node()
        duplicates = [] if node is None else _duplicates(node, "", set())
        values = None if node is None else loader.construct_document(node)
    except _REFUSALS as error:
        return YamlFile(path, problems=[_syntax_problem(path, error)], text=text)
    if values is None:
        return YamlFile(path, text=text)
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(values, list) else "only text" if isinstance(values, str) else "a single value"
        what = f"the file must hold settings such as `backend: torch`, but holds {kind}"
        problem = Problem(what, str(path), "start from the file that `ft init` writes")
        return YamlFile(path, problems=[problem], text=text)
    problems = [
        Problem(f"`{key}` is written twice, first on line {first}", f"{path}:{line} {key}", "keep one of the two")
        for key, first, line in duplicates
    ]
    return YamlFile(path, values, _lines(node), problems, text)


def read_scalar(text: str) -> Any:
    """What a word typed in a shell means in YAML: `null` is None, `[a, b]` a list; broken YAML stays the text it is."""
    try:
        return yaml_values(text)
    except ValueError:
        return text


def _duplicates(node: yaml.Node, prefix: str, seen: set[int]) -> list[tuple[str, int, int]]:
    """Keys written twice, with both lines; looked for before `<<` merges bring in legitimate ones."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return []
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return [found for part in node.value for found in _duplicates(part, prefix, seen)]
    found: list[tuple[str, int, int]] = []
    first: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        identity, line = (key.tag, str(key.value)), key.start_mark.line + 1
        if identity in first:
            found.append((name, first[identity], line))
        first.setdefault(identity, line)
        found += _duplicates(value, f"{name}.", seen)
    return found


def _read_text(path: Path) -> tuple[str, Problem | None]:
    where = str(path)
    try:
        if path.is_dir():
            return "", _folder_problem(path)
        if path.is_file() and (problem := _data_problem(path, "")):
            return "", problem
        return read_bytes(path, _LARGEST_FILE).decode("utf-8-sig"), None
    except FileNotFoundError:
        near = nearest_file(path)
        hint = f"did you mean {near}?" if near else "make one with `ft init`; a model is named with --model"
        return "", Problem("there is no such file", where, hint)
    except UnicodeDecodeError as error:
        what = f"the file is not UTF-8 text: byte {error.start} cannot be read"
        return "", Problem(what, where, "save it as UTF-8 in your editor")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return "", Problem(f"the file cannot be read: {reason}", where, "check the path and its permissions")


def _folder_problem(path: Path) -> Problem:
    """What a folder is that was given as a configuration."""
    if (path / "plan.yaml").is_file():
        what, hint = "this is a run", f"show it: ft report {path}; train as it did: ft train {path}/plan.yaml"
    elif (path / "config.json").is_file():
        what, hint = "this is a model", f"--model {path}"
    else:
        what, hint = "this is a folder", "name the YAML file inside it"
    return Problem(f"{what}, not a configuration file", str(path), hint)


def _data_problem(path: Path, text: str) -> Problem | None:
    """What is wrong where rows were given as a configuration: told by the file's name, or by its first line."""
    data = path.suffix.lower() in (".jsonl", ".csv", ".tsv", ".parquet")
    if not data and text[:1] in ("{", "["):
        try:
            first = json.loads(text if text[0] == "[" else text.partition("\n")[0])
        except (ValueError, RecursionError):
            return None
        data = isinstance(first, list) or (isinstance(first, dict) and "\n" in text.rstrip())
    return Problem("this is data, not a configuration file", str(path), f"--data {path}") if data else None


def _syntax_problem(path: Path, error: Exception) -> Problem:
    mark = getattr(error, "problem_mark", None)
    where = str(path) if mark is None else f"{path}:{mark.line + 1}:{mark.column + 1}"
    reason = getattr(error, "problem", None) or str(error).partition(";")[0]
    if "could not determine a constructor for the tag" in reason:
        tag = reason.split("'")[1].replace("tag:yaml.org,2002:", "!!")
        return Problem(f"the YAML tag {tag} is not allowed here", where, "write plain values: text, numbers and lists")
    if "'\\t'" in reason:
        return Problem("a tab is used for indentation, which YAML forbids", where, "indent with spaces")
    if isinstance(error, yaml.YAMLError):
        hint = "check indentation, colons, brackets and quotes there"
        return Problem(f"this is not valid YAML: {reason}", where, hint)
    return Problem(f"a value cannot be read: {reason}", where, "write plain text, numbers and lists")


def _lines(node: yaml.MappingNode) -> dict[str, int]:
    lines: dict[str, int] = {}
    seen: set[int] = set()
    for key, value in node.value:
        lines[str(key.value)] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode) and id(value) not in seen:
            seen.add(id(value))
            for inner, _ in value.value:
                lines[f"{key.value}.{inner.value}"] = inner.start_mark.line + 1
    return lines
