"""Laws of the report: it says what the run proved, all of it, inertly, and the same way each time."""

import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from finetune.errors import UsageError
from finetune.report import build_report, print_report, render_html
from finetune.report.numbers import say_number
from finetune.words import visible
from finetune_strategies.profiles import examples
from support.sample_run import sample_run

pytestmark = pytest.mark.tools

OUTCOMES = ("passed", "failed", "inconclusive", "not applicable")
CHARTS = ("loss", "rate", "scores", "memory", "lengths")
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}{# gone #}",
    "<!--",
    "]]></style></svg></span><script>alert(1)</script>",
    "&lt;b&gt; &#x41; &amp;amp;",
    "\u202eright to left override \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 \u200b",
    "long" * 5000,
    "\n\n  leading and trailing  \n",
    "$x^2$ \\frac{",
    "[bold]rich[/] [/nothing]",
    "' onmouseover='alert(1)",
)
# Control characters are a law of their own: a page cannot carry them as they are.
TEXTS = st.sampled_from(HOSTILE) | st.text(
    st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n\t"), min_size=1, max_size=80
)


class Page(HTMLParser):
    """The page as a parser sees it: elements, attributes, and the text inside each element of class `text`."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, page: str) -> None:
        """Parse the whole page at once."""
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.prose = ""
        self._open: list[tuple[str, bool]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Count the element and note whether it holds text of the run's own."""
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        own = dict(attrs).get("class") == "text"
        if own:
            self.texts.append("")
        if tag not in self.VOID:
            self._open.append((tag, own))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Count an element without content, as SVG writes them."""
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost element, which must be the one that is named."""
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        """Collect text where a reader would see it."""
        if self._open and self._open[-1][1]:
            self.texts[-1] += data
        if self._open and self._open[-1][0] not in ("script", "style"):
            self.prose += data

    def values(self, name: str) -> list[str]:
        """Every value of one attribute."""
        return [value for _, attribute, value in self.attributes if attribute == name]


@cache
def page_of_one() -> str:
    """The page of one complete run; it is drawn once for all laws that only look at it."""
    return render_html([sample_run()])


@cache
def page_of_three() -> str:
    """The page of two runs that are alike and of one without losses and scores, side by side."""
    return render_html([sample_run(), sample_run(), sample_run(id="another-run", losses={}, scores=None)])


def test_page_shows_hostile_text_inertly() -> None:
    """Whatever a model, a row or a path says, the page shows it letter for letter and gains no element by it."""
    plain_tags = Page(render_html([_quiet("some", "plain", "words", "here")])).tags

    @examples(1 / 5)
    @given(texts=st.lists(TEXTS, min_size=4, max_size=4))
    @example(texts=HOSTILE[0:4])
    @example(texts=HOSTILE[4:8])
    @example(texts=HOSTILE[8:12])
    def check(texts: Sequence[str]) -> None:
        page = Page(render_html([_quiet(*texts)]))
        assert page.tags == plain_tags
        assert page.tags["script"] == 1
        assert not [name for _, name, _ in page.attributes if name.startswith("on")]
        assert page.texts == list(texts)  # question, expected, before, after

    check()


@pytest.mark.parametrize(
    ("text", "shown"), [("a\0b\rc", "a\u2400b\u240dc"), ("\x1b[31m", "\u241b[31m"), ("\ud800", "?")]
)
def test_text_with_control_characters_is_shown_not_obeyed(text: str, shown: str) -> None:
    """A control character reaches neither page nor terminal; its picture does."""
    assert visible(text) == shown
    assert shown in Page(render_html([_quiet(text)])).texts
    assert shown in _printed(sample_run(notes=[text]))


@given(st.data())
def test_criterion_is_as_good_as_its_worst_verdict(data: st.DataObject) -> None:
    """A criterion failed if any verdict did, else it is inconclusive if any is; not applicable only when all are."""
    given_outcomes = data.draw(st.lists(st.sampled_from(OUTCOMES), max_size=5))
    verdicts = [
        {"criterion": 2, "outcome": outcome, "companion": data.draw(st.booleans())} for outcome in given_outcomes
    ]
    criterion = build_report({"verdicts": verdicts})["criteria"][1]
    ranked = [word for word in ("failed", "inconclusive", "passed", "not applicable") if word in given_outcomes]
    assert criterion["outcome"] == (ranked[0] if ranked else None)
    assert len(criterion["literal"]) + len(criterion["companions"]) == len(given_outcomes)


def test_page_and_terminal_name_every_outcome() -> None:
    """Every outcome is said in words, and so are its measured and allowed values, on the page and in the terminal."""
    run = sample_run()
    page, printed = " ".join(Page(page_of_one()).prose.split()), " ".join(_printed(run).split())
    assert len(run["verdicts"]) == 8
    for word in OUTCOMES:
        assert word in page
        assert word in printed
    for verdict in run["verdicts"]:
        for said in (verdict["title"], verdict["measured"], verdict["allowed"], verdict["reason"]):
            assert said in page
    without = sample_run(verdicts=[], losses={}, scores=None, memory=None)
    assert "No judge spoke" in Page(render_html([without])).prose


MISSING: dict[str, tuple[Any, set[str], str]] = {
    "scores": (None, {"scores"}, "the model was not questioned before and after"),
    "memory": (None, {"memory"}, "were not run in fresh processes"),
    "losses": ({}, {"loss", "rate"}, "the run recorded no optimizer step"),
    "data": (None, {"lengths"}, "run.json holds no row counts"),
    "plan": ([], set(), "run.json holds no plan"),
    "timing": ({}, set(), "run.json holds no timing"),
}
"""What a run can lack: how it does, the charts that go with it, and what the page then says."""


@pytest.mark.parametrize("sections", [("scores", "plan", "timing"), ("memory", "losses", "data")])
def test_missing_section_says_why(sections: tuple[str, ...]) -> None:
    """What was not recorded is said in a sentence, all else is shown, and no empty chart stands in for it."""
    page = Page(render_html([sample_run(**{section: MISSING[section][0] for section in sections})]))
    gone = set().union(*(MISSING[section][1] for section in sections))
    assert set(page.values("data-chart")) == set(CHARTS) - gone
    assert set(page.values("data-absent")) == gone
    assert [section for section in MISSING if MISSING[section][2] in page.prose] == [
        section for section in MISSING if section in sections
    ]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("reference-llama", "reference-llama"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("/home/ana/models/mine", "mine"),
        ("/home/ana/.cache/finetune/imported/SmolLM2.Q4_1-b179c9523d0e6a0f", "SmolLM2.Q4_1"),
    ],
)
@pytest.mark.parametrize("unit", ["nats per token", "nats per pair"])
def test_report_names_the_model_and_counts_losses_in_the_runs_own_unit(name: str, shown: str, unit: str) -> None:
    """The title has a folder's name, not its path; a loss of pairs is one number a pair."""
    run = sample_run()
    run["model"]["name"] = name
    run["goal"] = "preference" if unit == "nats per pair" else None
    page = render_html([run])
    assert f"<title>{shown} on " in page
    assert {"nats per token", "nats per pair"} & {*re.findall("nats per (?:token|pair)", page)} == {unit}


def test_empty_run_is_a_page_without_a_number() -> None:
    """A run.json that holds nothing gives a page that says so and never prints None or nan."""
    page = Page(render_html([{}]))
    assert page.tags["svg"] == 0
    assert set(page.values("data-absent")) == set(CHARTS)
    assert not re.search(r"\b(None|nan|inf|Undefined)\b", page.prose)
    assert page.prose.count("not measured") >= 8
    assert "not measured" in _printed({})


def test_page_of_the_same_run_is_the_same_bytes() -> None:
    """The same run gives the same page, here, again, and in a fresh process with another hash seed."""
    here = page_of_one()
    assert render_html([sample_run()]) == here
    script = (
        "import hashlib, json, sys; from finetune.report import render_html;"
        "print(hashlib.sha256(render_html([json.load(sys.stdin)]).encode()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(sample_run()),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert other.stdout.strip() == hashlib.sha256(here.encode()).hexdigest()


def test_charts_have_no_colour_of_their_own() -> None:
    """Every mark, line and letter of a chart takes its colour from the page, so that it follows the theme."""
    drawings = re.findall(r"<svg.*?</svg>", page_of_three(), flags=re.DOTALL)
    assert len(drawings) == 2 * len(CHARTS) + 3  # two of the third run, and the comparison
    for drawing in drawings:
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b[;\"]|rgba?\(|\bblack\b", drawing)
        shown = re.sub(r"<clipPath.*?</clipPath>|<defs>.*?</defs>", "", drawing, flags=re.DOTALL)
        elements = re.findall(r"<(?:path|text|use|rect)\b[^>]*>", shown)
        assert len(elements) > 10
        # Without a word on fill, SVG fills in black.
        assert not [element for element in elements if not re.search(r"fill: (none|var\(--[a-z]+\))", element)]


def test_page_ids_are_unique_and_references_resolve() -> None:
    """No id occurs twice on a page of several runs, and every reference into the page finds its target."""
    page = Page(page_of_three())
    ids = page.values("id")
    assert len(ids) > 300
    assert len(set(ids)) == len(ids)
    clips = [value[5:-1] for value in page.values("clip-path")]
    links = [value[1:] for value in page.values("href") if value.startswith("#")]
    assert clips
    assert links
    assert set(clips + links) <= set(ids)


def test_page_needs_nothing_from_outside() -> None:
    """The page names no address to load from, and its policy forbids one."""
    page = page_of_three()
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert f'content="{policy}"' in page
    assert not re.search(r"https?:|@import|\bsrc=", page)
    assert set(re.findall(r"url\((.)", page)) == {"#"}


def test_page_compares_several_runs_and_only_several() -> None:
    """Runs are shown side by side before each one's own section; one run is not compared with itself."""
    one, several = page_of_one(), page_of_three()
    assert "side by side" not in Page(one).prose.replace("answers side by side", "")
    assert "comparison" not in Page(one).values("data-chart")
    assert "comparison" in Page(several).values("data-chart")
    assert several.index('aria-label="Comparison"') < several.index("<article")
    assert several.count("<article") == 3
    with pytest.raises(UsageError):
        render_html([])


NOT_FINITE = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_report_is_strict_json_and_tells_what_was_not_finite(bad: float) -> None:
    """A loss that is not finite never makes report.json unreadable, and is never passed over in silence."""
    plan = [{"key": "training.weight_decay", "value": bad, "origin": "file"}]
    report = build_report(sample_run(losses=_losses(bad), throughput={"tokens_per_second": bad}, plan=plan))
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert any("not a finite number" in note and "step 4" in note for note in report["notes"])


def test_page_tells_what_was_not_finite() -> None:
    """A page whose losses are not all finite is drawn without those, and says how many they are and where."""
    page = Page(render_html([sample_run(losses=_losses(*NOT_FINITE), scores=None, memory=None)]))
    assert "not a finite number at 3 step(s), first at step 4" in page.prose
    assert not re.search(r"\b(nan|inf)\b", page.prose)
    assert {"loss", "rate"} <= set(page.values("data-chart"))


def _losses(*bad: float) -> dict[str, Any]:
    """The losses of a healthy run, but for these from the fourth step on."""
    losses: dict[str, Any] = sample_run()["losses"]
    for step, loss in enumerate(bad, start=3):
        losses["train"][step] = {**losses["train"][step], "loss": loss}
    return losses


@given(st.randoms(use_true_random=False))
def test_answers_meet_by_question_whatever_their_order(random: Any) -> None:
    """Each answer is shown under its own question even when the models were asked in different orders."""
    run = sample_run()
    straight = build_report(run)["answers"]["learning"]
    random.shuffle(run["scores"]["learning"]["tuned"]["answers"])
    assert build_report(run)["answers"]["learning"] == straight
    assert len(straight) == 10
    assert all(pair["base"] and pair["tuned"] for pair in straight)


def test_memory_parts_add_up_to_the_peak() -> None:
    """The stacked parts of each bar are the measured peak of live tensors, no byte more or less."""
    measures = build_report(sample_run())["memory"]
    assert [measure["method"] for measure in measures] == ["lora", "full"]
    for measure in measures:
        assert sum(measure["parts"].values()) == measure["peak_tensors"]


@given(st.floats(1e-9, 1e9))
def test_number_is_said_to_three_significant_digits(value: float) -> None:
    """A number read back from the report is within half a per cent of the one that was measured."""
    assert float(say_number(value).replace(",", "")) == pytest.approx(value, rel=0.00501)


def test_terminal_report_fits_80_columns_without_colour() -> None:
    """In a pipe the report is plain text of at most 80 columns."""
    printed = _printed(sample_run())
    assert "\x1b" not in printed
    assert max(len(line) for line in printed.splitlines()) <= 80
    assert "adapter/adapter_model.safetensors" in printed


def _printed(run: dict[str, Any]) -> str:
    stream = io.StringIO()
    print_report([run], Console(file=stream, width=80), verbose=True)
    return stream.getvalue()


def _quiet(*texts: str) -> dict[str, Any]:
    """A run with one chart: its only answer is made of four texts, or of one four times, and all else says them all."""
    question, expected, before, after = (texts * 4)[:4]
    base, tuned = (
        {"answers": [{"question": question, "expected": expected, "given": given, "right": True}]}
        for given in (before, after)
    )
    every = " ".join(texts)
    verdict = dict.fromkeys(("title", "measured", "allowed", "reason"), every) | {"criterion": 1, "outcome": "passed"}
    scores = {"learning": {"base": base, "tuned": tuned, "control": None}, "retention": None}
    return {
        **sample_run(losses={}, memory=None, verdicts=[verdict], scores=scores),
        **dict.fromkeys(("id", "command", "started", "status"), every),
        "notes": list(texts),
        "model": {"name": every, "files": [{"path": text, "sha256": every, "bytes": 3} for text in texts]},
        "plan": [{"key": text, "value": [text], "origin": every} for text in texts],
    }
