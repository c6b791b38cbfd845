"""The campaign: the clean trainer over many seeds, then every fault in a process of its own, and what was killed."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, TypeVar

from finetune.errors import EvidenceError, MissingExtraError, UsageError, install_line
from finetune.intervals import most_probable
from finetune.records import Outcome
from finetune.verify.faults.fault import Fault, faults
from finetune.verify.prove.job import FaultRun, Job, run_job
from finetune.verify.prove.kept import KeptRuns
from finetune.verify.run import chosen_laws

FORMAT = "finetune kill matrix"
VERSION = 2
Engine = Literal["processes", "ray"]
Teller = Callable[[str], None]
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
FaultStatus = Literal["killed", "survived", "equivalent", "error"]
STATUSES: tuple[FaultStatus, ...] = ("killed", "survived", "equivalent", "error")


@dataclass(frozen=True, slots=True)
class Spread:
    """Where faults are judged: in so many processes here, or over a Ray cluster, which knows how many it has."""

    engine: Engine = "processes"
    workers: int = 1


@dataclass(frozen=True, slots=True)
class FaultResult:
    """What became of one fault, in the words of mutation testing.

    `killed` by the laws named, cheapest first: each was broken on evidence, and holds without the fault. One that no
    law killed either changed an answer and `survived`, or is `equivalent`: it changed nothing that this tier asks for.
    `error`: it says nothing of the laws, for the `reason` given.
    """

    fault: Fault
    status: FaultStatus
    laws: tuple[str, ...]
    run: FaultRun
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        fault, run = self.fault, self.run
        return {
            "fault": fault.id,
            "slug": fault.slug,
            "stage": fault.stage,
            "real": fault.real,
            "what": fault.what,
            "tier": fault.tier,
            "status": self.status,
            "laws": list(self.laws),
            "example": run.first,
            "seconds": run.seconds,
            "seconds_to_kill": run.seconds_to_first,
            "hits": sum(run.hits.values()),
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Proof:
    """What a campaign came to.

    Attributes:
        laws: every law that was asked, cheapest first.
        stop_after: after so many laws that killed a fault no others were asked of it; 0 where all were.
        clean: the runs without a fault, one for each seed.
    """

    tier: int
    backend: str
    laws: tuple[str, ...]
    clean: tuple[FaultRun, ...]
    results: tuple[FaultResult, ...]
    seconds: float
    stop_after: int = 0
    times: float = 1.0

    @property
    def false_alarms(self) -> dict[int, list[str]]:
        """The laws that broke without a fault, by the seed."""
        return {run.seed: bad for run in self.clean if (bad := _alarms(run))}

    @property
    def false_alarm_bound(self) -> float:
        """How often a clean run is called broken, at most, with 95% confidence."""
        return most_probable(len(self.false_alarms), len(self.clean))

    @property
    def idle(self) -> tuple[str, ...] | None:
        """The laws that killed no fault; None where not every law was asked of every fault."""
        killers = {law for result in self.results for law in result.laws}
        return None if self.stop_after else tuple(law for law in self.laws if law not in killers)

    def of_status(self, status: FaultStatus) -> list[FaultResult]:
        """The faults with this status."""
        return [result for result in self.results if result.status == status]

    @property
    def passes(self) -> bool:
        """Whether there were faults, all that this tier is to see were killed, and no clean run was called broken."""
        seen = all(each.status == "killed" or each.fault.tier > self.tier for each in self.results)
        return bool(self.results) and seen and not self.false_alarms

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "tier": self.tier,
            "backend": self.backend,
            "laws": list(self.laws),
            "stop_after": self.stop_after,
            "times": self.times,
            "counts": {status: len(self.of_status(status)) for status in STATUSES},
            "clean_runs": len(self.clean),
            "idle": None if self.idle is None else list(self.idle),
            "false_alarms": {str(seed): bad for seed, bad in self.false_alarms.items()},
            "false_alarm_bound": self.false_alarm_bound,
            "seconds": self.seconds,
            "faults": [result.as_dict() for result in self.results],
        }


def chosen_faults(ids: Sequence[str] = (), backend: str = "reference") -> tuple[Fault, ...]:
    """All faults that can be planted in a backend, or those that are named by id or slug.

    Raises:
        UsageError: there is no such fault, or it cannot be planted there.
    """
    known = faults()
    by_name = {**known, **{fault.slug: fault for fault in known.values()}}
    if unknown := [name for name in ids if name not in by_name]:
        near = get_close_matches(unknown[0], by_name, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        hint += f"`ft prove --list` has all {len(known)}"
        raise UsageError(f"there is no fault {unknown[0]!r}", hint=hint)
    if foreign := [by_name[name] for name in ids if backend not in by_name[name].backends]:
        where = " or ".join(foreign[0].backends)
        raise UsageError(f"{foreign[0].id} cannot be planted in {backend}", hint=f"say --backend {where}")
    chosen = (by_name[name] for name in ids) if ids else known.values()
    return tuple(fault for fault in chosen if backend in fault.backends)


def run_jobs(jobs: Sequence[Job], spread: Spread, kept: KeptRuns | None = None) -> Iterator[FaultRun]:
    """The jobs, so many at once, in their order; those that are kept are not done again.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    if kept is not None:
        done = {job: run for job in jobs if (run := kept.of(job))}
        left = [job for job in jobs if job not in done]
        rest = kept.keep(left, run_jobs(left, spread))
        yield from (done[job] if job in done else next(rest) for job in jobs)
        return
    if spread.engine == "ray":
        yield from on_ray(run_job, jobs)
        return
    stop = threading.Event()
    with ThreadPoolExecutor(spread.workers) as pool:
        try:
            yield from pool.map(partial(run_job, stop=stop), jobs)
        finally:
            stop.set()


def on_ray(work: Callable[[_Task], _Result], tasks: Iterable[_Task]) -> Iterator[_Result]:
    """The work on each task over a Ray cluster, one processor each, in the order of the tasks.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("Ray is not installed", hint=install_line("ray")) from None
    ours = not ray.is_initialized()
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    try:
        remote = ray.remote(num_cpus=1)(work)
        for waiting in [remote.remote(task) for task in tasks]:
            result: _Result = ray.get(waiting)
            yield result
    finally:
        if ours:
            ray.shutdown()


def result_of(fault: Fault, run: FaultRun, clean: FaultRun, tier: int = 1) -> FaultResult:
    """What became of a fault, told from the run without one that had the same seed."""
    if run.error:
        return FaultResult(fault, "error", (), run, run.error)
    sound = {law: word for law, word in run.words.items() if clean.words.get(law) == Outcome.PASSED}
    killers = tuple(law for law, word in sound.items() if word == Outcome.FAILED)
    changed = any(clean.answers.get(question, mark) != mark for question, mark in run.answers.items())
    if not run.hits:
        if killers or changed or fault.tier <= tier:
            what = "yet laws were broken" if killers else "yet answers changed" if changed else "so nothing was tried"
            return FaultResult(fault, "error", (), run, f"what was planted was never called in tier {tier}, {what}")
        return FaultResult(fault, "equivalent", (), run, f"only tier {fault.tier} calls what was planted")
    if killers:
        return FaultResult(fault, "killed", killers, run)
    if unjudged := {law: word for law, word in sound.items() if word != Outcome.PASSED}:
        outcomes = ", ".join(f"{law} ({word})" for law, word in unjudged.items())
        return FaultResult(fault, "error", (), run, f"no law was broken, and these were not judged: {outcomes}")
    return FaultResult(fault, "survived" if changed else "equivalent", (), run)


def _alarms(run: FaultRun) -> list[str]:
    return [law for law, word in run.words.items() if word in (Outcome.FAILED, Outcome.ERROR, Outcome.INCONCLUSIVE)]


def by_stage(results: Sequence[FaultResult]) -> Mapping[str, tuple[int, int]]:
    """For each stage how many faults were killed, and how many there are."""
    stages = dict.fromkeys(result.fault.stage for result in results)
    return {
        stage: (
            sum(result.status == "killed" for result in results if result.fault.stage == stage),
            sum(result.fault.stage == stage for result in results),
        )
        for stage in stages
    }


@dataclass(frozen=True, slots=True)
class Campaign:
    """How hard a campaign looks.

    Attributes:
        seeds: so many clean runs, each with a seed of its own.
        stop_after: after so many laws that killed a fault no others are asked; 0 asks all.
        times: so many times the cases of profile `fast`.
    """

    tier: int = 1
    seeds: int = 20
    stop_after: int = 1
    backend: str = "reference"
    times: float = 1.0

    def job(self, fault: str = "", seed: int = 0) -> Job:
        """What is done in one process; without a fault all laws are asked."""
        return Job(
            fault=fault,
            tier=self.tier,
            seed=seed,
            backend=self.backend,
            stop_after=self.stop_after if fault else 0,
            times=self.times,
            # Where all laws are asked there are many broken ones, and which they are is what counts.
            shrink_seconds=1.5 if self.stop_after else 0.2,
        )


def prove(
    chosen: Sequence[Fault],
    campaign: Campaign = Campaign(),  # it is frozen
    *,
    spread: Spread = Spread(),  # it is frozen
    tell: Teller = lambda words: None,
    kept: KeptRuns | None = None,
) -> Proof:
    """Judge the clean trainer with so many seeds, then plant each fault and judge; all with the laws of a tier.

    Runs that were `kept` of a campaign that was stopped are not done again.

    Raises:
        EvidenceError: not even the clean trainer could be judged.
    """
    began = time.monotonic()
    tier, backend = campaign.tier, campaign.backend
    laws = tuple(law.id for law in chosen_laws(tier))
    clean = []
    for run in run_jobs([campaign.job(seed=seed) for seed in range(campaign.seeds)], spread, kept):
        if run.error:
            raise EvidenceError(f"the clean trainer could not be judged with seed {run.seed}: {run.error}")
        alarms = _alarms(run)
        tell(f"clean, seed {run.seed}: {'FALSE ALARM: ' + ', '.join(alarms) if alarms else 'passed'}")
        clean.append(run)
    results = []
    jobs = [campaign.job(fault.id) for fault in chosen]
    for fault, run in zip(chosen, run_jobs(jobs, spread, kept), strict=True):
        result = result_of(fault, run, clean[0], tier)
        by = f" by {', '.join(result.laws[:3])}" if result.laws else f": {result.reason[:200]}" if result.reason else ""
        tell(f"{fault.id} {fault.slug}: {result.status}{by}")
        results.append(result)
    seconds = round(time.monotonic() - began, 1)
    return Proof(tier, backend, laws, tuple(clean), tuple(results), seconds, campaign.stop_after, campaign.times)
