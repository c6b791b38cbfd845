"""Measures training speed next to TRL: the same job, each in its own environment, turn by turn, as ratios.

`make bench`, or `python bench/run.py --steps 20 --repeats 3`. Timings of a machine drift by the hour; only the
ratios inside one run mean anything.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import job

ROOT = Path(__file__).resolve().parent.parent
PEER = ROOT / ".peers" / "trl"
PEER_PACKAGES = ("torch", "transformers", "peft", "datasets", "trl")


def peer_python() -> Path:
    """The interpreter of TRL's own environment, made when it is missing."""
    python = PEER / "bin" / "python"
    done = PEER / "packages-ok"
    if not done.exists():
        print("setting up: an environment for TRL (once)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", PEER], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
        subprocess.run([*pip, "torch"], check=True)
        subprocess.run([*pip, *PEER_PACKAGES], check=True)
        done.touch()
    return python


def make_model(folder: Path) -> None:
    """A random model and a tokenizer with a word for each id."""
    from tokenizers import Tokenizer, models

    from finetune.backends import open_backend

    open_backend("torch").create(job.CONFIG, folder, seed=0)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, 1024)}}
    Tokenizer(models.WordLevel(words, unk_token="<pad>")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "</s>"}))


def measure(python: Path, script: str, model: Path, steps: int) -> dict:
    """Run one trainer once."""
    command = [python, ROOT / "bench" / script, "--model", model, "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write every measurement here")
    asked = parser.parse_args()
    trainers = [("train_finetune.py", Path(sys.executable)), ("train_trl.py", peer_python())]
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for turn in range(asked.repeats):
            for script, python in trainers:
                one = measure(python, script, Path(folder), asked.steps)
                found.setdefault(one["name"], []).append(one)
                speed = one["tokens"] / one["seconds"]
                print(
                    f"turn {turn + 1}  {one['name']:<9} {speed:7,.0f} tokens/s  ({one['tokens']:,} tokens in "
                    f"{one['seconds']:.1f} s, first loss {one['losses'][0]:.3f}, peak {one['peak_rss'] / 1e6:,.0f} MB)",
                    flush=True,
                )
    ratios = [
        (ours["tokens"] / ours["seconds"]) / (theirs["tokens"] / theirs["seconds"])
        for ours, theirs in zip(found["finetune"], found["trl"], strict=True)
    ]
    memory = [a["peak_rss"] / b["peak_rss"] for a, b in zip(found["finetune"], found["trl"], strict=True)]
    print(f"speed: FineTune / TRL = {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")
    print(f"peak memory: FineTune / TRL = {statistics.median(memory):.2f}")
    if asked.json:
        asked.json.write_text(json.dumps({"measurements": found, "speed_ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
