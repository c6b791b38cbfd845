"""Measures training and data preparation next to the peers: the same jobs, each in its own environment, as ratios.

`make bench`, or `python bench/run.py --only long --repeats 5`. Timings of a machine drift by the hour; only the
ratios inside one run mean anything, and they are taken turn by turn.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import job
from peers import ROOT, converter, fast_blas, peer_python

OURS = Path(sys.executable)
Found = dict[str, list[dict]]


@dataclass(frozen=True, slots=True)
class Contestant:
    """Who trains, by which script and in which environment; some are too slow for all steps of a job."""

    name: str
    script: str
    python: Path
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    steps: int | None = None


def contestants(backend: str) -> list[Contestant]:
    """FineTune first, which every other one is compared with."""
    if backend == "torch":
        return [
            Contestant("finetune", "train_finetune.py", OURS),
            Contestant("trl", "train_trl.py", peer_python("trl")),
        ]
    peer, fast = peer_python("mlx-lm"), fast_blas()
    ours = Contestant("finetune mlx", "train_finetune.py", OURS, ("--backend", "mlx"), fast)
    same = Contestant("mlx_lm, same BLAS", "train_mlx_lm.py", peer, (), fast)
    return [ours, same, Contestant("mlx_lm, stock", "train_mlx_lm.py", peer, steps=2)] if fast else [ours, same]


@contextmanager
def model_of(task: job.Job) -> Iterator[Path]:
    """The folder of a job's model: the shipped one, or one of random weights with a tokenizer of a word for each id."""
    from tokenizers import Tokenizer, models

    from finetune.backends import open_backend
    from finetune.models.locate import locate_model

    if isinstance(task.model, str):
        yield locate_model(task.model).folder
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        open_backend("torch").create(task.model, folder, seed=0)
        words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{index}": index for index in range(3, 1024)}}
        Tokenizer(models.WordLevel(words, unk_token="<pad>")).save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "</s>"}))
        yield folder


def measure(one: Contestant, model: Path, *arguments: str) -> dict:
    """Run one contestant once."""
    command = [one.python, ROOT / "bench" / one.script, "--name", one.name, "--model", model]
    environment = {**os.environ, **one.environment}
    done = subprocess.run(
        [*command, *one.arguments, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        sys.exit(f"{one.script} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare_training(name: str, backend: str, repeats: int) -> Found:
    """Train turn by turn and print each turn."""
    task = job.JOBS[name]
    print(f"training, {task.title}, LoRA r {job.RANK} on all linear layers, fp32, {task.steps} steps", flush=True)
    found: Found = {}
    with model_of(task) as model:
        for turn in range(repeats):
            for one in contestants(backend):
                told = measure(one, model, "--job", name, "--steps", str(one.steps or task.steps))
                found.setdefault(one.name, []).append(told)
                print(
                    f"turn {turn + 1}  {one.name:<17} {told['tokens'] / told['seconds']:9,.0f} tokens/s  ("
                    f"{told['tokens']:,} tokens in {told['seconds']:.1f} s, first loss {told['losses'][0]:.3f}, "
                    f"peak {told['peak_rss'] / 1e6:,.0f} MB)",
                    flush=True,
                )
    ours = next(iter(found.values()))
    shares = [one["saving"] / one["seconds"] for one in ours]
    if any(shares):
        print(f"checkpoints, one every ten steps: {spread(shares, '.1%')} of FineTune's time in training")
    return found


def compare_data(rows: int, repeats: int) -> Found:
    """Prepare data turn by turn and print each turn; both must have made the same tokens and marked the same ones."""
    from finetune.models.locate import locate_model

    model = locate_model("reference-llama").folder
    both = [
        Contestant("finetune", "prepare_finetune.py", OURS),
        Contestant("trl", "prepare_trl.py", peer_python("trl")),
    ]
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder:
        questions = Path(folder) / "questions.jsonl"
        job.write_questions(questions, rows)
        for turn in range(repeats):
            for one in both:
                told = measure(one, model, "--rows", str(questions))
                found.setdefault(one.name, []).append(told)
                print(
                    f"turn {turn + 1}  {one.name:<9} {told['tokens'] / told['seconds']:9,.0f} tokens/s  ("
                    f"{told['tokens']:,} tokens, {told['trained']:,} trained; prepared in {told['prepare']:.1f} s, "
                    f"batched in {told['batch']:.1f} s, peak {told['peak_rss'] / 1e6:,.0f} MB)",
                    flush=True,
                )
    made = {(told["tokens"], told["trained"]) for ones in found.values() for told in ones}
    print("tokens and marks: the same" if len(made) == 1 else f"tokens and marks DIFFER: {sorted(made)}")
    return found


def compare_converting(repeats: int) -> Found:
    """Write GPT-2 124 M as GGUF turn by turn with llama.cpp's own converter; both read the files from the cache."""
    from finetune.models.locate import locate_model

    found: Found = {}
    converter()
    with model_of(job.JOBS["gpt2"]) as model:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(locate_model("reference-gpt2").folder / name, model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "n_ctx": config["n_positions"]}))
        for turn in range(repeats + 1):
            for outtype in ("f16", "q8_0"):
                for name in ("finetune", "llama_cpp"):
                    request = {"model": str(model), "outtype": outtype, "file": f"{model}/{name}.gguf", "pre": "gpt-2"}
                    program = [OURS, ROOT / "bench" / f"convert_{name}.py"]
                    done = subprocess.run(
                        program, input=json.dumps(request) + "\n", capture_output=True, text=True, check=False
                    )
                    if done.returncode:
                        sys.exit(f"convert_{name}.py failed:\n{done.stderr[-3000:]}")
                    told = json.loads(done.stdout)
                    if turn:  # the first finds the files not yet in the system's cache
                        one = {"seconds": told["seconds"][0], "tokens": 1, "peak_rss": told["peak_rss"]}
                        found.setdefault(f"{name} {outtype}", []).append(one)
                        print(f"turn {turn}  {name:<9} {outtype:<5} {one['seconds']:6.2f} s", flush=True)
    return found


def compare_start(backend: str, repeats: int) -> Found:
    """Start `ft train` on the shipped model turn by turn with a process that only imports the frameworks."""
    found: Found = {backend: []}
    command = [OURS, ROOT / "bench" / "first_step.py", backend]
    environment = {**os.environ, **(fast_blas() if backend == "mlx" else {})}
    for _ in range(repeats + 1):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found[backend].append(json.loads(done.stdout))
    del found[backend][0]  # which found the files not yet in the system's cache
    pairs = found[backend]
    ratios = [one["first step"] / one["import"] for one in pairs]
    alone = statistics.median(one["import"] for one in pairs)
    print(f"{backend}: first step done after {spread(ratios)} x the time of importing the frameworks ({alone:.1f} s)")
    return found


def spread(numbers: list[float], form: str = ".2f") -> str:
    """The median, and from where to where."""
    return f"{statistics.median(numbers):{form}} (from {min(numbers):{form}} to {max(numbers):{form}})"


def tell_ratios(found: Found) -> None:
    """Print how FineTune compares with each other one, from the turns' own ratios."""
    (us, ours), *others = found.items()
    for name, theirs in others:
        pairs = list(zip(ours, theirs, strict=True))
        speed = [(a["tokens"] / a["seconds"]) / (b["tokens"] / b["seconds"]) for a, b in pairs]
        memory = [a["peak_rss"] / b["peak_rss"] for a, b in pairs]
        print(f"speed: {us} / {name} = {spread(speed)};  peak memory: {spread(memory)}", flush=True)


def main() -> None:
    what = ["data", *job.JOBS, "mlx", "start", "convert"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=what, action="append", help="measure only this, or these")
    parser.add_argument("--json", type=Path, help="also write every measurement here")
    asked = parser.parse_args()
    found = {}
    for each in asked.only or what:
        if each == "start":
            found |= {f"start {backend}": compare_start(backend, asked.repeats) for backend in ("torch", "mlx")}
            continue
        if each == "convert":
            found[each] = compare_converting(asked.repeats)
            for outtype in ("f16", "q8_0"):
                tell_ratios({name: ones for name, ones in found[each].items() if name.endswith(outtype)})
            continue
        if each == "data":
            found[each] = compare_data(asked.rows, asked.repeats)
        elif each == "mlx":
            found[each] = compare_training("long", "mlx", asked.repeats)
        else:
            found[each] = compare_training(each, "torch", asked.repeats)
        tell_ratios(found[each])
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
