"""Go itself renders the templates that were derived for Ollama, and ours that stands for it renders the same."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from finetune.serve.derive import SPACES, derive_template, drawn_conversations
from finetune.serve.go_template import ExecutionError, GoTemplate, literal
from support.real_templates import REAL

pytestmark = pytest.mark.tier2
PROGRAM = """
package main

import ("bytes"; "encoding/json"; "os"; "text/template")

type Message struct { Role string `json:"role"`; Content string `json:"content"` }
type Case struct { Template string; Messages []*Message }
type Told struct { Text string; Error string }

func main() {
    var cases []Case
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    told := make([]Told, len(cases))
    for i, each := range cases {
        parsed, err := template.New("").Option("missingkey=zero").Parse(each.Template)
        var shown bytes.Buffer
        if err == nil { err = parsed.Execute(&shown, map[string]any{"Messages": each.Messages}) }
        if err != nil { told[i].Error = err.Error() } else { told[i].Text = shown.String() }
    }
    json.NewEncoder(os.Stdout).Encode(told)
}
"""
SAID = (
    "ab",
    " a b ",
    "\n",
    "{{ .System }}",
    '"""',
    "é🦙",
    "\u2003x\x85",
    "",
    "}}",
    "\\n",
    *(f"{one}x{one}" for one in SPACES),
)
TEXTS = (
    "{",
    "{{",
    "{{{",
    '{ "',
    "}}",
    '"""',
    "\x00\x85\u2028\U000e0001",
    "a\tb\r\n",
    "{{/* x */}}",
    "-}}",
    "{{- x -}} \n",
)


def cases() -> list[dict[str, Any]]:
    """Every family's template with conversations, windows of them, and texts that are awkward to write."""
    found: list[dict[str, Any]] = []
    for real in REAL.values():
        template = derive_template(
            lambda asked, real=real: real.compiled.render_prompt(asked).text, bos=real.bos, texts=SAID
        )
        for conversation in drawn_conversations(SAID):
            turns = [{"role": each.role, "content": each.content} for each in conversation.messages]
            found += [{"Template": template, "Messages": each} for each in (turns, turns[:-1], turns[1:])]
    found += [{"Template": literal(text) + '{{ "" }}' + literal(text), "Messages": []} for text in TEXTS]
    return found


def ours(case: dict[str, Any]) -> tuple[str, bool]:
    """What our own reading of the template shows, and whether it could be executed."""
    try:
        return GoTemplate(case["Template"]).render(case["Messages"]), True
    except ExecutionError:
        return "", False


def test_go_renders_what_ours_renders(tmp_path: Path) -> None:
    """Of 17 families' templates and 11 awkward texts Go makes what ours makes, and fails of none."""
    if shutil.which("go") is None:
        pytest.skip("needs Go itself: https://go.dev/dl, or apt-get install golang-go")
    (tmp_path / "main.go").write_text(PROGRAM, encoding="utf-8")
    asked = cases()
    assert len(asked) == 17 * 60 * 3 + 11
    done = subprocess.run(
        ["go", "run", "main.go"],
        cwd=tmp_path,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    told = [(each["Text"], not each["Error"]) for each in json.loads(done.stdout)]
    mine = [ours(case) for case in asked]
    assert [number for number, (own, theirs) in enumerate(zip(mine, told, strict=True)) if own != theirs] == []
    assert all(whole for _, whole in told)
