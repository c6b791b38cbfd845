"""Laws of what stays on the disk: checkpoints and files are whole or not there."""

from typing import Any

from finetune.verify.catalogue import Law, add, law, oracle
from finetune.verify.check import check
from finetune.verify.client import SubjectClient
from finetune.verify.subjects.answers import CheckpointsReply, Content, Done
from finetune.verify.subjects.subject import RefusesError
from finetune_strategies.cases import store as cases


def _kept(trainer: SubjectClient, keep: int, orders: list[dict[str, object]]) -> CheckpointsReply:
    return trainer.ask("keep_checkpoints", CheckpointsReply, keep=keep, orders=orders)


@law("store.keeps", ["keep_checkpoints"], cases.ORDERS, scene="checkpoints", examples=6)
@oracle("the numbers themselves")
def newest_and_best_stay(trainer: SubjectClient, case: cases.Orders) -> None:
    """A store lists exactly what it must keep: the newest checkpoints, by their numbers, and the best one."""
    best = case.steps[case.best]
    orders = [{"do": "save", "step": step, "content": f"of {step}", "best": min(best, step)} for step in case.steps]
    found = _kept(trainer, case.keep, [*orders, {"do": "open", "step": best}])
    wanted = sorted({best, *case.steps[-case.keep :]})
    check(found.listed == wanted, expected=wanted, got=found.listed)
    check(found.found[-1] == f"of {best}", expected=f"the content of {best}", got=found.found[-1] or found.refused[-1])


@law("store.full_disk", ["keep_checkpoints"], cases.ORDERS, scene="checkpoints", examples=4)
@oracle("what was saved before")
def full_disk_costs_nothing(trainer: SubjectClient, case: cases.Orders) -> None:
    """Where the disk is full it is said, and every checkpoint that was whole before still is."""
    *before, last = case.steps
    orders = [{"do": "save", "step": step, "content": f"of {step}"} for step in before]
    orders += [{"do": "fill", "step": last, "content": f"of {last}"}, {"do": "open", "step": before[-1]}]
    found = _kept(trainer, case.keep, orders)
    check(found.refused[-2], expected="a word of the full disk", got="nothing")
    said = found.found[-1] or found.refused[-1]
    check(said == f"of {before[-1]}", expected=f"of {before[-1]}", got=said)
    wanted = before[-case.keep :]
    check(found.listed == wanted, expected=wanted, got=found.listed)


@law("store.torn", ["keep_checkpoints"], cases.ORDERS, scene="checkpoints", examples=4)
@oracle("only what was saved to its end")
def torn_checkpoint_is_none(trainer: SubjectClient, case: cases.Orders) -> None:
    """No death of a writer costs a checkpoint that must stay; what it left half done is neither listed nor opened."""
    *before, last = case.steps
    orders: list[dict[str, Any]] = [{"do": "save", "step": step, "content": f"of {step}"} for step in before]
    orders += [{"do": "tear", "step": last, "content": "torn"}, {"do": "open", "step": last}]
    found = _kept(trainer, case.keep, orders)
    check(last not in found.listed, expected=f"{last} is not listed", got=found.listed)
    check(found.refused[-1], expected="a refusal", got=found.found[-1])


@law("store.damaged", ["keep_checkpoints"], cases.ORDERS, scene="checkpoints", examples=2)
@oracle("what was saved")
def damaged_one_is_refused(trainer: SubjectClient, case: cases.Orders) -> None:
    """What is damaged or gone is never opened: it is refused."""
    step = case.steps[0]
    found = _kept(trainer, case.keep, [{"do": do, "step": step, "content": "of"} for do in ("save", "damage", "open")])
    check(found.refused[-1], expected="a refusal", got=found.found[-1])


@law("files.whole", ["replace_file"], cases.FILES_WHOLE, examples=6)
@oracle("the two contents")
def file_is_old_or_new(trainer: SubjectClient, case: cases.Replaced) -> None:
    """A file that is written anew holds the old content or the new one, whatever happens; a failure is told."""
    given = {"before": case.before, "after": case.after, "room": case.room}
    fits = case.room >= len(case.after)
    found = trainer.ask("replace_file", Content, **given)
    check(found.text == (case.after if fits else case.before), expected="the old text or the new", got=found.text)
    check(found.refused is not fits, expected="a word where it failed", got=f"refused: {found.refused}")


@law("files.room", ["check_room"], cases.FILES_ROOM, examples=4)
@oracle("no disk takes 10^17 bytes; every one that can run this takes one")
def room_is_looked_for(trainer: SubjectClient, case: cases.Wanted) -> None:
    """What the disk has no room for is refused before anything is written."""
    try:
        trainer.ask("check_room", Done, wanted=case.size)
        fits = True
    except RefusesError:
        fits = False
    check(fits is (case.size == 1), expected=f"{case.size} bytes to fit: {case.size == 1}", got=fits)


_STORIES = {
    "store.code": "A process that was left alone does all that it was told, and one that died did so as it was to.",
    "store.answers": "What was done is answered with nothing.",
    "store.opens_whole": "What is whole is opened, and holds what was put there.",
    "store.reads_only": "To open changes nothing.",
    "store.damage_found": "Exactly what is damaged is called so, by its name.",
}
for _id, _statement in _STORIES.items():
    add(Law(_id, _statement, ("store_life",), "a list of what was saved", scene="checkpoints", tier=2, cost=30))
