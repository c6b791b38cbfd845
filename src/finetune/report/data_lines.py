"""What became of rows, in lines for a terminal: read, dropped and why, tokens, and how long rows are."""

from collections.abc import Mapping
from typing import Any

from finetune.report.numbers import say_count, say_percent

_WIDTH = 40
"""Characters of the longest bar."""


def data_lines(name: str, counts: Mapping[str, Any], *, block: str = "█") -> list[str]:
    """The lines of one set of rows; `counts` as `run.json` and `ft check --json` have them.

    Args:
        name: what the set is called, such as `data.train`.
        block: what bars are made of.
    """
    lost = sum(counts["dropped"].values())
    lines = [
        f"{name}: {say_count(counts['read'])} rows read, {say_count(counts['kept'])} kept, {say_count(lost)} dropped"
    ]
    lines += [f"  dropped: {say_count(count)} {why}{_first(counts, why)}" for why, count in _largest(counts["dropped"])]
    shapes = ", ".join(f"{shape} {say_count(count)}" for shape, count in _largest(counts["shapes"]))
    lines += [f"  shapes: {shapes}"] * bool(shapes)
    lines += [f"  {say_count(count)} from {file}" for file, count in _largest(counts["sources"])]
    if tokens := counts["tokens"]:
        share = say_percent(counts["trained_tokens"] / tokens)
        lines.append(
            f"  tokens: {say_count(tokens)}, {say_count(counts['trained_tokens'])} of them trained ({share}); "
            f"{say_count(counts['truncated'])} rows truncated, {say_count(counts['split'])} split"
        )
    return lines + [f"  {line}" for line in _histogram(counts["lengths"], block)]


def _first(counts: Mapping[str, Any], why: str) -> str:
    place = counts["dropped_at"].get(why)
    return f" (first: {place})" if place else ""


def _largest(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _histogram(lengths: Mapping[str, Any] | None, block: str) -> list[str]:
    if not lengths:
        return []
    head = (
        f"tokens a row: {say_count(lengths['shortest'])} to {say_count(lengths['longest'])}, median "
        f"{say_count(lengths['median'])}, 95% have at most {say_count(lengths['most'])}"
    )
    most = max(rows for *_, rows in lengths["steps"])
    wide = max(len(say_count(last)) for _, last, _ in lengths["steps"])
    return [
        head,
        *(
            f"{say_count(first):>{wide}} to {say_count(last):>{wide}} {block * -(-_WIDTH * rows // most):<{_WIDTH}} "
            f"{say_count(rows)}"
            for first, last, rows in lengths["steps"]
        ),
    ]
