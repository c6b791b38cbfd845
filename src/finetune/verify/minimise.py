"""Makes a failing story smaller while the same law breaks in the same way: fewer stages, rows, settings, smaller sizes.

Every candidate is smaller than the best so far, and none is tried twice, so that it ends, and ends the same each time.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from finetune.config import default_of
from finetune.verify.recipes import FEWEST_WORDS, ModelRecipe, TaskRecipe
from finetune.verify.stages import Stage
from finetune.verify.stories import StageFinding, StoreScene, Story, TrainingScene
from finetune.verify.theatre import StoryResult

SECONDS = 300.0
"""How long anybody waits, unless told otherwise."""
_SIZES: Mapping[str, int] = {
    "layers": 1,
    "hidden": 1,
    "heads": 1,
    "kv_heads": 1,
    "head_size": 2,
    "intermediate": 1,
    "vocabulary": FEWEST_WORDS,
    "seed": 0,
}
_LEAST: Mapping[str, int] = dict.fromkeys(
    ("training.epochs", "training.max_steps", "training.batch_size", "training.accumulation", "adapter.rank"), 1
)
"""Settings that are left out only at their default, and made smaller: without them a story might take longer."""


@dataclass(frozen=True, slots=True)
class Minimised:
    """The smallest story that was found, how many candidates were tried, and whether there was time for all."""

    story: Story
    tried: int
    finished: bool


Judge = Callable[[Story], StageFinding | None]
"""Tells a candidate; which law broke and how, None where it is not the one that is looked for."""


def same_break(looked_for: Story, candidate: Story, outcome: StoryResult) -> StageFinding | None:
    """What broke in the candidate, where it is the law that is looked for, at the same kind of stage.

    A run that not even undisturbed comes to its end must give the same reason: other tasks have other ones.
    """
    finding, wanted = outcome.finding, looked_for.broken
    if finding is None or wanted is None or finding.law != wanted.law:
        return None
    same = candidate.stage_of(finding) == looked_for.stage_of(wanted)
    return finding if same and (finding.stage > 0 or _reason(finding) == _reason(wanted)) else None


def _reason(finding: StageFinding) -> list[str]:
    """The errors that were told, without numbers and paths."""
    return [re.sub(r"\S*/\S*|\d+", "", line) for line in re.findall(r"error: .*", finding.got)]


def minimise(
    story: Story, judge: Judge, *, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic
) -> Minimised:
    """The smallest story that breaks so, as far as there was time; one candidate may run on when it is over.

    Args:
        story: one that breaks; it is not told again.
    """
    end = clock() + seconds
    seen = {_key(story)}
    best, before = story, None
    while before is not best:
        before = best
        for smaller in _PASSES:
            candidates = smaller(best)
            while (candidate := next(candidates, None)) is not None:
                if _key(candidate) in seen or weight(candidate) >= weight(best):
                    continue
                if clock() >= end:
                    return Minimised(best, len(seen) - 1, finished=False)
                seen.add(_key(candidate))
                finding = judge(candidate)
                if finding is not None:
                    best = _until(candidate, finding)
                    candidates = smaller(best)
    return Minimised(best, len(seen) - 1, finished=True)


def _until(story: Story, finding: StageFinding) -> Story:
    """The story up to the stage at which it breaks; what would come after it is never told."""
    kept = story.stages[: finding.stage] if finding.stage else story.stages
    return story.model_copy(update={"stages": kept, "broken": finding})


def weight(story: Story) -> tuple[float, ...]:
    """How large a story is: stages and what is in them, rows, letters, sizes of the model, settings."""
    stages = [stage.model_dump(mode="json") for stage in story.stages]
    parts = (len(stages), sum(map(_things, stages)), sum(map(_numbers, stages)))
    if not isinstance(story.setting, TrainingScene):
        return (*parts, story.setting.keep)
    task = story.setting.task
    letters = sum(len(text) for row in task.rows for text in row.values())
    sizes = sum(getattr(task.model, name) for name in _SIZES)
    lowered = sum(value for key, value in task.settings.items() if key in _LEAST)
    return (*parts, len(task.rows), letters, len(task.settings), lowered, sizes)


def _key(story: Story) -> str:
    return story.setting.model_dump_json() + "".join(stage.model_dump_json() for stage in story.stages)


def _things(value: Any) -> int:
    """How many items the lists and mappings in a value have."""
    if isinstance(value, dict):
        return sum(1 + _things(item) for item in value.values() if item is not None)
    return sum(1 + _things(item) for item in value) if isinstance(value, list) else 0


def _numbers(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(_numbers(item) for item in (value.values() if isinstance(value, dict) else value))
    return abs(int(value)) if isinstance(value, int) else 0


def _with_fewer_stages(story: Story) -> Iterator[Story]:
    yield from (story.model_copy(update={"stages": stages}) for stages in shorter(story.stages) if stages)


def _with_smaller_stages(story: Story) -> Iterator[Story]:
    for number, stage in enumerate(story.stages):
        for other in _smaller_stages(stage):
            yield story.model_copy(update={"stages": (*story.stages[:number], other, *story.stages[number + 1 :])})


def _with_fewer_rows_and_earlier_deaths(story: Story) -> Iterator[Story]:
    """Fewer rows are fewer steps, so that a death comes too late unless it is as much earlier."""
    if not isinstance(story.setting, TrainingScene):
        return
    task = story.setting.task
    for rows in shorter(task.rows):
        share = len(rows) / len(task.rows)
        yield story.model_copy(
            update={
                "setting": TrainingScene(task=task.model_copy(update={"rows": rows})),
                "stages": tuple(_dying_earlier(stage, share) for stage in story.stages),
            }
        )


def _dying_earlier(stage: Stage, share: float) -> Stage:
    death = getattr(stage, "death", None)
    return stage.model_copy(update={"death": replace(death, after=round(death.after * share))}) if death else stage


def _keeping_fewer(story: Story) -> Iterator[Story]:
    if isinstance(story.setting, StoreScene):
        for keep in lower(story.setting.keep, 1):
            yield story.model_copy(update={"setting": StoreScene(keep=keep)})


def _of_task(smaller: Callable[[TaskRecipe], Iterator[Mapping[str, Any]]]) -> Callable[[Story], Iterator[Story]]:
    """A pass over what a story's run is to learn; what makes no sense is left out."""

    def stories(story: Story) -> Iterator[Story]:
        if isinstance(story.setting, TrainingScene):
            task = story.setting.task
            for values in smaller(task):
                try:
                    changed = TaskRecipe.model_validate({**dict(task), **values})
                except ValidationError:
                    continue
                yield story.model_copy(update={"setting": TrainingScene(task=changed)})

    return stories


def _fewer_rows(task: TaskRecipe) -> Iterator[Mapping[str, Any]]:
    yield from ({"rows": rows} for rows in shorter(task.rows))


def _shorter_rows(task: TaskRecipe) -> Iterator[Mapping[str, Any]]:
    for letters in (1, 4, 16):
        yield {"rows": tuple({name: text[:letters] for name, text in row.items()} for row in task.rows)}
    for index, row in enumerate(task.rows):
        for name, text in row.items():
            for length in lower(len(text), 1):
                yield {"rows": (*task.rows[:index], {**row, name: text[:length]}, *task.rows[index + 1 :])}


def _smaller_settings(task: TaskRecipe) -> Iterator[Mapping[str, Any]]:
    settings = task.settings
    for key in (key for key in _LEAST if key in settings):
        for number in lower(int(settings[key]), _LEAST[key]):
            yield {"settings": {**settings, key: type(settings[key])(number)}}
    sizes = {key for key in _LEAST if key in settings and settings[key] != default_of(key)}
    others = tuple(key for key in settings if key not in sizes)
    for kept in (*shorter(others), ()):
        yield {"settings": {key: value for key, value in settings.items() if key in sizes or key in kept}}


def _smaller_models(task: TaskRecipe) -> Iterator[Mapping[str, Any]]:
    for name, least in _SIZES.items():
        for number in lower(getattr(task.model, name), least):
            try:
                yield {"model": ModelRecipe(**{**dict(task.model), name: number})}
            except ValidationError:
                continue


_PASSES: tuple[Callable[[Story], Iterator[Story]], ...] = (
    _with_fewer_stages,
    _of_task(_fewer_rows),
    _with_fewer_rows_and_earlier_deaths,
    _of_task(_smaller_settings),
    _of_task(_smaller_models),
    _of_task(_shorter_rows),
    _with_smaller_stages,
    _keeping_fewer,
)
"""What spares most comes first."""


def _smaller_stages(stage: Stage) -> Iterator[Stage]:
    for values in _smaller_values(stage.model_dump(mode="json")):
        try:
            yield type(stage).model_validate_json(json.dumps(values))
        except ValidationError:
            continue


def _smaller_values(value: Any) -> Iterator[Any]:
    """The value with one number in it nearer to 0, or one list in it shorter."""
    if isinstance(value, dict):
        for name, item in value.items():
            if isinstance(item, dict):
                yield {**value, name: None}
            yield from ({**value, name: other} for other in _smaller_values(item))
    elif isinstance(value, list):
        yield from map(list, shorter(tuple(value)))
        for number, item in enumerate(value):
            yield from ([*value[:number], other, *value[number + 1 :]] for other in _smaller_values(item))
    elif isinstance(value, int) and not isinstance(value, bool):
        sign = -1 if value < 0 else 1
        yield from (sign * number for number in lower(abs(value), 0))


def shorter(items: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The items without half of them, without a quarter, ..., without each one: delta debugging's candidates."""
    size = len(items)
    while size > 1:
        size = (size + 1) // 2
        yield from (items[:start] + items[start + size :] for start in range(0, len(items), size))


def lower(number: int, least: int) -> Iterator[int]:
    """Smaller numbers: the least first, then halfway, ..., then one less."""
    distance = number - least
    while distance > 0:
        yield number - distance
        distance //= 2
