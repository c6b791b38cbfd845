"""Laws of the faults: each can be planted in our reference, in public functions alone."""

import ast
from pathlib import Path

import pytest

import finetune.verify.faults as room
from finetune.verify.faults import fault


def test_fault_can_be_planted_in_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a fault replaces is there and public."""
    # What is planted is taken out again when the test ends.
    monkeypatch.setattr(fault, "setattr", monkeypatch.setattr, raising=False)
    known = fault.faults().values()
    assert len(known) > 200
    for each in known:
        each.plant_in("reference")


def test_fault_names_public_targets() -> None:
    """No planting in any file of faults names a private function, whether a law reaches it or not."""
    plantings = ("plant", "plant_session", "planted_by", "in_place_of")
    names = [
        (path.name, name.value)
        for path in Path(room.__file__).parent.glob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in plantings
        for name in call.args[:2]
        if isinstance(name, ast.Constant) and isinstance(name.value, str)
    ]
    assert len(names) > 150
    assert [each for each in names if each[1].startswith("_") and each[1] != "__init__"] == []


def test_fault_whose_target_is_gone_is_refused() -> None:
    """A planting that nothing answers to is refused in one sentence that names it."""
    with pytest.raises(fault.PlantingError, match=r"finetune\.verify\.faults\.nothing is gone: plant the fault"):
        fault.plant(room, "nothing", lambda right: right())
    with pytest.raises(fault.PlantingError, match=r"finetune\.verify\.faults\._nothing is private: plant the fault"):
        fault.plant(room, "_nothing", lambda right: right())
    with pytest.raises(fault.PlantingError, match=r"fault\.plant takes what its fault does not .*too many"):
        fault.plant(fault, "plant", lambda right, owner: right(owner))
    known = next(each for each in fault.faults().values() if each.backends == ("reference",))
    with pytest.raises(fault.PlantingError, match="cannot be planted in torch: only in reference"):
        known.plant_in("torch")
