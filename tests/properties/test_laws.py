"""The catalogue on our reference trainer, in this process: every law passes, and planted faults fail it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.verify.catalogue import SUBJECTS, Law, case_laws, catalogue
from finetune.verify.client import SubjectClient
from finetune.verify.faults import fault
from finetune.verify.judge import Effort, judge
from finetune.verify.subjects.process import SubprocessSubject, reference_oracle
from finetune.verify.trainers.ours import inside

LAWS = case_laws(1)
FAILED_BY = {
    "A003": "config.taken",
    "A020": "cache.same",
    "A024c": "split.unseen",
    "A024d": "split.unseen",
    "A027b": "rows.remarks",
    "A027c": "data.files",
    "A036": "data.judged",
    "A036b": "data.judged",
    "A036c": "data.judged",
    "A037": "data.columns",
    "A037b": "data.names",
    "A038": "data.mix",
    "A038b": "data.mix",
    "A038c": "data.mix",
    "A041": "template.bos",
    "A067": "mask.answers",
    "A056": "template.beside",
    "A072b": "mask.weights",
    "A073": "mask.beside",
    "A078": "mask.surprise",
    "A083": "template.ids",
    "A104": "packing.cover",
    "A109b": "padding.no_target",
    "A130": "schedule.closed_form",
    "A166": "resume.onward",
    "A166b": "resume.onward",
    "A165b": "resume.longer",
    "A164d": "resume.longer",
    "A168": "store.torn",
    "A177": "resume.damaged",
    "A177b": "resume.log",
    "A181": "adapter.damaged",
    "A200": "merge.exact",
    "A220": "export.weights",
    "A267": "generate.fits",
    "A269d": "generate.greedy",
    "A276": "evaluate.file",
    "A276b": "evaluate.file",
    "A282": "memory.counts",
    "A310": "dpo.reference",
    "A311": "dpo.reference",
    "A312": "dpo.oracle",
    "A313": "dpo.oracle",
    "A295": "safety.files",
    "A305": "serve.recipe",
    "A029b": "order.neighbours",
    "A033": "mask.limits",
    "A066": "mask.none",
    "A057b": "template.blocks",
    "A106": "packing.texts",
    "A143": "dropout.spares_base",
    "A010c": "adapter.blocks",
    "A195": "adapter.placeless",
    "A206": "merge.damaged",
    "A236": "export.constants",
    "A269e": "generate.many",
    "A151": "train.moves",
    "A202b": "merge.half",
}
"""A fault of each stage, and a law that fails on it."""


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SubprocessSubject]:
    """The oracle: our trainer in a process of its own, which no planted fault reaches."""
    subject = reference_oracle(tmp_path_factory.mktemp("laws") / "oracle")
    yield subject
    subject.close()


@pytest.fixture(scope="module")
def trainer(oracle: SubprocessSubject, tmp_path_factory: pytest.TempPathFactory) -> SubjectClient:
    """Our own trainer in float64, in this process."""
    scratch = tmp_path_factory.mktemp("laws")
    return SubjectClient(inside("reference", scratch), scratch, oracle)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_law_passes_on_the_reference_trainer(law: Law, trainer: SubjectClient) -> None:
    """A few cases of each law, more where they are cheap; `ft prove` judges this trainer by all of them."""
    result = judge(law, trainer, Effort(times=0.25 if law.cost == 1 else 0.05))
    assert result.outcome == "passed", result


@pytest.mark.tools
@pytest.mark.parametrize(("planted", "law"), FAILED_BY.items())
def test_law_fails_on_a_planted_fault(
    planted: str, law: str, oracle: SubprocessSubject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that is planted in our trainer is found, in a small case."""
    # What is planted is taken out again when the test ends.
    monkeypatch.setattr(fault, "setattr", monkeypatch.setattr, raising=False)
    trainer = SubjectClient(inside("reference", tmp_path), tmp_path, oracle)
    fault.faults()[planted].apply()
    result = judge(LAWS[law], trainer, Effort(shrink_seconds=0.2))
    assert result.outcome == "failed", result
    assert result.case is not None


def test_catalogue_files_each_law_under_its_subject() -> None:
    """Every id is `subject.what`, stands in the file of its subject, and each law is a sentence with an oracle."""
    files = {subject: name for name, subjects in SUBJECTS.items() for subject in subjects}
    laws = catalogue()
    assert len(laws) >= 130
    assert {law.subject for law in laws.values()} == set(files)
    for id, law in laws.items():
        assert re.fullmatch(r"[a-z]+\.[a-z_]+", id), id
        assert law.statement.endswith("."), id
        assert law.oracle, id
        assert law.needs or law.subject == "protocol", id
        assert (law.check is None) == (law.cases is None) == (law.kind is None), id
        assert law.cases is not None or law.scene or law.subject == "protocol", id
        if law.check is not None:
            assert law.check.__module__ == f"finetune.verify.laws.{files[law.subject]}", id
