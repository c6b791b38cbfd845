"""The campaign: the clean trainer over many seeds, then every fault in a process of its own, and what was caught."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from finetune.errors import EvidenceError, MissingExtraError, UsageError
from finetune.intervals import most_probable
from finetune.verify.faults.fault import Fault, faults
from finetune.verify.prove.job import Job, Planted, run_job
from finetune.verify.suite.run import chosen_laws

FORMAT = "finetune kill matrix"
VERSION = 1
Engine = Literal["processes", "ray"]
Teller = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Spread:
    """Where plantings are judged: in so many processes here, or over a Ray cluster, which knows how many it has."""

    engine: Engine = "processes"
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of one fault.

    `killed` by the laws named, cheapest first: each was broken, or ended in an error. One that no law killed either
    changed an answer and `survived`, or is `inert`: it changed nothing that anybody asked for in this tier.
    """

    fault: Fault
    outcome: Literal["killed", "survived", "inert"]
    laws: tuple[str, ...]
    planted: Planted

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        fault, planted = self.fault, self.planted
        return {
            "fault": fault.id,
            "slug": fault.slug,
            "stage": fault.stage,
            "real": fault.real,
            "what": fault.what,
            "tier": fault.tier,
            "outcome": self.outcome,
            "laws": list(self.laws),
            "example": planted.first,
            "seconds": planted.seconds,
            "seconds_to_kill": planted.seconds_to_first,
            "reached": sum(planted.reached.values()),
            "trouble": planted.trouble,
        }


@dataclass(frozen=True, slots=True)
class Proof:
    """What a campaign came to.

    Attributes:
        laws: every law that was asked, cheapest first.
        enough: after so many laws that caught a fault no others were asked of it; 0 where all were.
        clean: the runs without a fault, one for each seed.
    """

    tier: int
    backend: str
    laws: tuple[str, ...]
    clean: tuple[Planted, ...]
    fates: tuple[Fate, ...]
    seconds: float
    enough: int = 0

    @property
    def false_alarms(self) -> dict[int, list[str]]:
        """The laws that broke without a fault, by the seed."""
        return {run.seed: bad for run in self.clean if (bad := _bad(run))}

    @property
    def false_alarm_bound(self) -> float:
        """How often a clean run is called broken, at most, with 95 % confidence."""
        return most_probable(len(self.false_alarms), len(self.clean))

    @property
    def idle(self) -> tuple[str, ...] | None:
        """The laws that caught no fault; None where not every law was asked of every fault."""
        caught = {law for fate in self.fates for law in fate.laws}
        return None if self.enough else tuple(law for law in self.laws if law not in caught)

    def killed(self, outcome: str = "killed") -> list[Fate]:
        """The faults with this outcome."""
        return [fate for fate in self.fates if fate.outcome == outcome]

    @property
    def passes(self) -> bool:
        """Whether there were faults, all that this tier is to see were killed, and no clean run was called broken."""
        seen = all(fate.outcome == "killed" or fate.fault.tier > self.tier for fate in self.fates)
        return bool(self.fates) and seen and not self.false_alarms

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "tier": self.tier,
            "backend": self.backend,
            "laws": list(self.laws),
            "enough": self.enough,
            "counts": {name: len(self.killed(name)) for name in ("killed", "survived", "inert")},
            "clean_runs": len(self.clean),
            "idle": None if self.idle is None else list(self.idle),
            "false_alarms": {str(seed): bad for seed, bad in self.false_alarms.items()},
            "false_alarm_bound": self.false_alarm_bound,
            "seconds": self.seconds,
            "faults": [fate.as_dict() for fate in self.fates],
        }


def chosen_faults(ids: Sequence[str] = ()) -> tuple[Fault, ...]:
    """All faults, or those that are named by id or slug.

    Raises:
        UsageError: there is no such fault.
    """
    known = faults()
    by_name = {**known, **{fault.slug: fault for fault in known.values()}}
    if unknown := [name for name in ids if name not in by_name]:
        near = f"there are {len(known)}, from {next(iter(known), '')} to {list(known)[-1] if known else ''}"
        raise UsageError(f"there is no fault {unknown[0]!r}", hint=f"`ft prove --list` has them: {near}")
    return tuple(by_name[name] for name in ids) if ids else tuple(known.values())


def run_jobs(jobs: Iterable[Job], spread: Spread) -> Iterator[Planted]:
    """The jobs, so many at once, in their order.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    if spread.engine == "ray":
        yield from _on_ray(jobs)
        return
    stop = threading.Event()
    with ThreadPoolExecutor(spread.workers) as pool:
        try:
            yield from pool.map(partial(run_job, stop=stop), jobs)
        finally:
            stop.set()


def _on_ray(jobs: Iterable[Job]) -> Iterator[Planted]:
    try:
        import ray
    except ImportError:
        raise MissingExtraError("Ray is not installed", hint="pip install 'finetune-suite[ray]'") from None
    ours = not ray.is_initialized()
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    try:
        remote = ray.remote(num_cpus=1)(run_job)
        for waiting in [remote.remote(job) for job in jobs]:
            planted: Planted = ray.get(waiting)
            yield planted
    finally:
        if ours:
            ray.shutdown()


def workers_here() -> int:
    """How many plantings are judged at once where nobody says."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def fate_of(fault: Fault, planted: Planted, clean: Planted) -> Fate:
    """What became of a fault, told from the run without one that had the same seed."""
    laws = tuple(law for law in _bad(planted) if clean.words.get(law) == "holds")
    # What says of an ability that it has gone, where the clean trainer has it, is noticed too.
    laws += tuple(
        law for law, word in planted.words.items() if word == "not applicable" and clean.words[law] == "holds"
    )
    if laws or planted.trouble:
        return Fate(fault, "killed", laws, planted)
    changed = bool(planted.reached) and any(
        clean.answers.get(question, mark) != mark for question, mark in planted.answers.items()
    )
    return Fate(fault, "survived" if changed else "inert", (), planted)


def _bad(planted: Planted) -> list[str]:
    bad = [law for law, word in planted.words.items() if word in ("broken", "error", "undecided")]
    return bad or ([planted.trouble] if planted.trouble else [])


def by_stage(fates: Sequence[Fate]) -> Mapping[str, tuple[int, int]]:
    """For each stage how many faults were killed, and how many there are."""
    stages = dict.fromkeys(fate.fault.stage for fate in fates)
    return {
        stage: (
            sum(fate.outcome == "killed" for fate in fates if fate.fault.stage == stage),
            sum(fate.fault.stage == stage for fate in fates),
        )
        for stage in stages
    }


def prove(
    chosen: Sequence[Fault],
    *,
    tier: int = 1,
    seeds: int = 20,
    enough: int = 1,
    spread: Spread = Spread(),  # it is frozen
    tell: Teller = lambda words: None,
) -> Proof:
    """Judge the clean trainer with so many seeds, then plant each fault and judge; all with the laws of a tier.

    Args:
        enough: after so many laws that caught a fault no others are asked; 0 asks all.

    Raises:
        EvidenceError: not even the clean trainer could be judged.
    """
    began = time.monotonic()
    laws = tuple(law.id for law in chosen_laws(tier))
    clean = []
    for planted in run_jobs((Job(tier=tier, seed=seed) for seed in range(seeds)), spread):
        if planted.trouble:
            raise EvidenceError(f"the clean trainer could not be judged with seed {planted.seed}: {planted.trouble}")
        bad = _bad(planted)
        tell(f"clean, seed {planted.seed}: {'FALSE ALARM: ' + ', '.join(bad) if bad else 'holds'}")
        clean.append(planted)
    fates = []
    jobs = (Job(fault=fault.id, tier=tier, enough=enough) for fault in chosen)
    for fault, planted in zip(chosen, run_jobs(jobs, spread), strict=True):
        fate = fate_of(fault, planted, clean[0])
        by = ", ".join(fate.laws[:3]) or planted.trouble[:100]
        tell(f"{fault.id} {fault.slug}: {fate.outcome}" + (f" by {by}" if by else ""))
        fates.append(fate)
    return Proof(tier, "reference", laws, tuple(clean), tuple(fates), round(time.monotonic() - began, 1), enough)
