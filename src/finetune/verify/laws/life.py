"""Laws of a run's life: however often it is ended, moved and damaged, it goes on, and ends as if nothing had happened.

They hold at every stage of a story: `stateful` tells it, and says where each is looked for.
"""

from finetune.verify.catalogue import Law, add

_ORACLE = "a run of the same task that nobody disturbed, and what lay on the disk before"
_LAWS = {
    "run.ends": "A run that nothing disturbs comes to its end.",
    "run.says_so": "However a process ends, it says so in words and never with a traceback.",
    "run.code": "The exit code tells how a process ended.",
    "run.full_disk": "On a full disk a run says what it cannot write.",
    "run.last_words": "An interrupted run says which checkpoint is intact and how to go on, and so it is.",
    "checkpoints.outlive": "No death costs a checkpoint that was complete before it.",
    "checkpoints.whole": "Every checkpoint that is listed as complete is whole.",
    "checkpoints.logged": "No checkpoint is of a later step than the last one that the log tells of.",
    "checkpoints.damage_found": "Exactly the checkpoint that was damaged is called damaged.",
    "refuse.what_cannot_be": "To begin twice, resume what is finished or never begun, or measure too early is refused.",
    "refuse.touches_nothing": "What is refused is refused with a hint, and all stays as it is.",
    "course.same": "What the log tells of training is, at every moment, how an undisturbed run begins.",
    "result.whole": "No file of a finished run is other than the run says.",
    "result.damage_found": "Exactly the file of a finished run that was damaged is called damaged.",
    "measure.refuses_damaged": "What was trained is not measured once it is damaged, and the file is named.",
    "measure.same": "A finished run measures as one that nobody disturbed.",
    "end.course": "However often it was ended, a finished run tells all that an undisturbed one tells.",
    "end.files": "However often it was ended, a run ends with the same bytes.",
    "end.names": "However often it was ended, a run leaves the same files and no more.",
    "end.record": "However often it was ended, a run says the same of itself.",
}
for _id, _statement in _LAWS.items():
    add(Law(_id, _statement, ("life",), _ORACLE, scene="training", tier=2, cost=30))
