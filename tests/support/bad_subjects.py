"""A trainer that does one thing wrong, by its first argument; it imports nothing but the door's other side."""

import os
import subprocess
import sys
import time
from pathlib import Path

from serving import UnsupportedError, serve

SLEEPER = "import time; time.sleep(3600)"


def main() -> None:
    """Answer two questions, one of them badly."""
    way = sys.argv[1]
    if way == "hangs before it speaks":
        time.sleep(3600)
    if way == "is no protocol":
        print("Hello, I am a trainer.", flush=True)
        time.sleep(3600)
    count = 0

    def render(model: str, settings: dict, messages: list, *, prompt: bool) -> dict:
        return {"text": messages[0]["content"]}

    def loss(model: str, settings: dict, batch: list, adapter: str | None = None) -> dict:
        nonlocal count
        count += 1
        _misbehave(way, Path(model))
        if way == "answers otherwise":
            return {"loss": float(count)}
        return {"loss": float("nan") if way == "says no number" else 1.25}

    def logits(model: str, settings: dict, prompts: list, adapter: str | None = None) -> dict:
        return {"file": str(Path.cwd() / "nowhere.safetensors")}

    handlers = {"render": render, "loss": loss, **({"logits": logits} if way == "names no file" else {})}
    serve(f"a trainer that {way}", {"it": "1"}, handlers, missing={"train": "it does not train"})


def _misbehave(way: str, model: Path) -> None:
    if way == "hangs":
        time.sleep(3600)
    elif way == "crashes":
        print("the roof is on fire", file=sys.stderr, flush=True)
        os._exit(70)
    elif way == "prints garbage":
        for number in range(3, 64):
            try:
                os.write(number, b"\xff\xfe no JSON\n")
            except OSError:
                continue
    elif way == "prints no end":
        for number in range(3, 64):
            try:
                os.write(number, b"[")
            except OSError:
                continue
        time.sleep(3600)
    elif way == "leaks":
        subprocess.Popen([sys.executable, "-c", SLEEPER], start_new_session=True)
    elif way == "leaks unmarked":
        subprocess.Popen([sys.executable, "-c", SLEEPER], start_new_session=True, env={})
    elif way == "writes beside":
        (model.parent.parent / "litter.txt").write_text("litter")
    elif way == "spoils its input":
        config = model / "config.json"
        config.write_text(config.read_text() + " ")
    elif way == "lies":
        raise UnsupportedError("there is no loss here")


if __name__ == "__main__":
    main()
