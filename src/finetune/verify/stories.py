"""Stories: what was done to a subject, stage by stage, and the law that broke; plain JSON that people can read."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from platform import python_version
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from finetune.errors import UsageError
from finetune.files import write_text
from finetune.verify.laws import LAWS
from finetune.verify.recipes import Recipe, TaskRecipe
from finetune.verify.stages import Stage, stages_of

FORMAT = "finetune story"
VERSION = 1
_MODULES = {"finetune-suite": "finetune", "hypothesis": "hypothesis"}
MOST_BYTES = 1_000_000
MOST_STAGES = 200


class TrainingScene(Recipe):
    """A run of a task."""

    scene: Literal["training"] = "training"
    task: TaskRecipe


class StoreScene(Recipe):
    """A store that keeps so many of the newest checkpoints."""

    scene: Literal["checkpoints"] = "checkpoints"
    keep: Annotated[int, Field(ge=1, le=20)] = 1


Scene = Annotated[TrainingScene | StoreScene, Field(discriminator="scene")]
_SCENES: TypeAdapter[TrainingScene | StoreScene] = TypeAdapter(Scene)


class StageFinding(Recipe):
    """Which law broke at which stage, counted from 1, and how."""

    law: str
    statement: str
    stage: Annotated[int, Field(ge=0)]
    expected: str
    got: str


class Origin(Recipe):
    """Where a story comes from: whose it is, and the versions that made it."""

    subject: str
    versions: dict[str, str] = Field(default_factory=dict)
    seed: str = ""


def origin_of(subject: str, seed: str = "") -> Origin:
    """A story of this subject, made here and now."""
    versions = {name: version(name) for name in ("finetune-suite", "hypothesis") if find_spec(_MODULES[name])}
    return Origin(subject=subject, versions={"python": python_version(), **versions}, seed=seed)


class Story(Recipe):
    """What is there at the beginning, what was done, what broke, and where that was seen."""

    setting: Scene
    stages: tuple[Stage, ...]
    broken: StageFinding | None = None
    origin: Origin

    def stage_of(self, finding: StageFinding) -> str:
        """The name of the stage at which a law broke; "" where not even an undisturbed run came to its end."""
        return self.stages[finding.stage - 1].do if finding.stage else ""

    @property
    def text(self) -> str:
        """The story as JSON, each stage and each row in a line of its own."""
        values: dict[str, Any] = {"format": FORMAT, "version": VERSION, **self.setting.model_dump(mode="json")}
        values["stages"] = [stage.model_dump(mode="json", exclude_none=True) for stage in self.stages]
        values["broken"] = self.broken.model_dump(mode="json") if self.broken else None
        values["origin"] = self.origin.model_dump(mode="json")
        return _readable(values) + "\n"


def _readable(value: Any, depth: int = 0) -> str:
    """JSON in which what fits into a line of 110 letters has one."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if (len(line) + depth <= 110 and depth) or not inner:
        return line
    start = "\n" + " " * (depth + 1)
    named = isinstance(value, dict)
    keys = [f"{json.dumps(key, ensure_ascii=False)}: " for key in value] if named else [""] * len(value)
    items = [f"{key}{_readable(item, depth + 1)}" for key, item in zip(keys, inner, strict=True)]
    opening, closing = "{}" if named else "[]"
    return f"{opening}{start}{f',{start}'.join(items)}\n{' ' * depth}{closing}"


def save_story(story: Story, path: Path) -> None:
    """Put a story at a path, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, story.text)


def load_story(path: Path) -> Story:
    """The story in a file.

    Raises:
        UsageError: it is none; all that is wrong with it is told at once.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UsageError(f"{path} is no story: {path.stat().st_size:,} bytes, at most {MOST_BYTES:,}")
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", hint="name the JSON file of a story") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no story: it is not JSON: {error}", hint="a failing machine names its") from None
    story, problems = parse_story(values)
    if story is None:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        told = "\n".join(f"  {problem}" for problem in problems)
        raise UsageError(f"{path} is no story: {count}\n{told}", hint="mend the file, or make the story again")
    return story


def parse_story(values: Any) -> tuple[Story | None, Sequence[str]]:
    """The story that a JSON document tells, or all that is wrong with it."""
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return None, [f"format: is not {FORMAT!r}"]
    if values.get("version") != VERSION:
        return None, [f"version: {values.get('version')!r}; this program reads version {VERSION}"]
    known = {"format", "version", "scene", "task", "keep", "stages", "broken", "origin"}
    problems = [f"{key}: no story has this" for key in sorted(set(values) - known)]
    scene = _parsed(_SCENES, {key: values[key] for key in ("scene", "task", "keep") if key in values}, "", problems)
    stages = _parse_stages(values.get("stages"), str(values.get("scene")), problems)
    broken = _parsed(TypeAdapter(StageFinding | None), values.get("broken"), "broken", problems)
    if broken is not None:
        if broken.law not in LAWS:
            problems.append(f"broken.law: there is no law {broken.law!r}")
        if broken.stage > len(stages):
            problems.append(f"broken.stage: {broken.stage} of {len(stages)} stages")
    origin = _parsed(TypeAdapter(Origin), values.get("origin"), "origin", problems)
    if problems:
        return None, problems
    return Story.model_construct(setting=scene, stages=stages, broken=broken, origin=origin), ()


def _parse_stages(values: Any, scene: str, problems: list[str]) -> tuple[Stage, ...]:
    if not isinstance(values, list) or len(values) > MOST_STAGES:
        problems.append(f"stages: a list of at most {MOST_STAGES} stages is needed")
        return ()
    known: Mapping[str, type[Stage]] = stages_of(scene)
    stages = []
    for number, value in enumerate(values, start=1):
        name = value.get("do") if isinstance(value, dict) else value
        if not isinstance(name, str) or name not in known:
            problems.append(f"stage {number}: there is no stage {name!r} in this scene; there are: {', '.join(known)}")
        else:
            stages.append(_parsed(TypeAdapter(known[name]), value, f"stage {number}", problems))
    return tuple(stage for stage in stages if stage is not None)


def _parsed(adapter: TypeAdapter[Any], value: Any, place: str, problems: list[str]) -> Any:
    """The value as it is meant, or None and a line for each of its problems."""
    try:
        return adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        for each in error.errors(include_url=False, include_input=False):
            where = ".".join(filter(None, [place, *map(str, each["loc"])])) or "story"
            problems.append(f"{where}: {each['msg']}")
        return None


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")
