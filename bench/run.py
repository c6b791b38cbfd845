"""Measures training and data preparation next to TRL: the same jobs, each in its own environment, as ratios.

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


def measure(python: Path, script: str, model: Path, *job_arguments: str) -> dict:
    """Run one trainer once."""
    command = [python, ROOT / "bench" / script, "--model", model, *job_arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare_training(python: Path, steps: int, repeats: int) -> dict[str, list[dict]]:
    """Train turn by turn and print each turn."""
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for turn in range(repeats):
            for script, interpreter in (("train_finetune.py", Path(sys.executable)), ("train_trl.py", python)):
                one = measure(interpreter, script, Path(folder), "--steps", str(steps))
                found.setdefault(one["name"], []).append(one)
                speed = one["tokens"] / one["seconds"]
                print(
                    f"turn {turn + 1}  {one['name']:<9} {speed:9,.0f} tokens/s  ({one['tokens']:,} tokens in "
                    f"{one['seconds']:.1f} s, first loss {one['losses'][0]:.3f}, peak {one['peak_rss'] / 1e6:,.0f} MB)",
                    flush=True,
                )
    return found


def compare_data(python: Path, rows: int, repeats: int) -> dict[str, list[dict]]:
    """Prepare data turn by turn and print each turn; both must have made the same tokens and marked the same ones."""
    from finetune.models.locate import locate_model

    model = locate_model("reference-llama").folder
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        questions = Path(folder) / "questions.jsonl"
        job.write_questions(questions, rows)
        for turn in range(repeats):
            for script, interpreter in (("prepare_finetune.py", Path(sys.executable)), ("prepare_trl.py", python)):
                one = measure(interpreter, script, model, "--rows", str(questions))
                found.setdefault(one["name"], []).append(one)
                print(
                    f"turn {turn + 1}  {one['name']:<9} {one['tokens'] / one['seconds']:9,.0f} tokens/s  ("
                    f"{one['tokens']:,} tokens, {one['trained']:,} trained; prepared in {one['prepare']:.1f} s, "
                    f"batched in {one['batch']:.1f} s, peak {one['peak_rss'] / 1e6:,.0f} MB)",
                    flush=True,
                )
    made = {(one["tokens"], one["trained"]) for ones in found.values() for one in ones}
    print("tokens and marks: the same" if len(made) == 1 else f"tokens and marks DIFFER: {sorted(made)}")
    return found


def ratios(found: dict[str, list[dict]], what: str) -> None:
    """Print how FineTune compares, from the turns' own ratios."""
    pairs = list(zip(found["finetune"], found["trl"], strict=True))
    speed = [(a["tokens"] / a["seconds"]) / (b["tokens"] / b["seconds"]) for a, b in pairs]
    memory = [a["peak_rss"] / b["peak_rss"] for a, b in pairs]
    print(f"{what} speed: FineTune / TRL = {statistics.median(speed):.2f} (from {min(speed):.2f} to {max(speed):.2f})")
    print(f"{what} peak memory: FineTune / TRL = {statistics.median(memory):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["training", "data"], help="measure only this")
    parser.add_argument("--json", type=Path, help="also write every measurement here")
    asked = parser.parse_args()
    python = peer_python()
    found = {}
    if asked.only != "training":
        found["data"] = compare_data(python, asked.rows, asked.repeats)
    if asked.only != "data":
        found["training"] = compare_training(python, asked.steps, asked.repeats)
    for what, measurements in found.items():
        ratios(measurements, what)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
