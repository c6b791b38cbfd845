"""How a fault is planted in the session of the backend under judgement, and what sessions keep under other names."""

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.ports import Session
from finetune.records import Batch, BatchArrays
from finetune.verify.faults.fault import backend_under_judgement, plant

Ids = NDArray[np.int64]
Places = NDArray[np.bool_]
Arrays = tuple[Ids, Ids, Places, Ids]
"""Ids (sequences, length), targets (n,), where their logits are, and where each token's row starts."""
WrongArrays = Callable[[int, Batch, Ids, Places, Ids], Arrays]
_SESSIONS = {"reference": "ReferenceSession", "torch": "TorchSession", "mlx": "MlxSession"}


def plant_session(name: str, wrong: Callable[..., object]) -> None:
    """Plant a fault in a method of `ports.Session`, as the backend under judgement has it."""
    # Imported by its name: no framework is loaded but the one that is judged.
    module = import_module(f"finetune.backends.{backend_under_judgement()}.session")
    plant(getattr(module, _SESSIONS[backend_under_judgement()]), name, wrong)


def plant_opening(name: str, wrong: Callable[..., object]) -> None:
    """Plant a fault in what the backend under judgement asks when it opens a model."""
    plant(import_module(f"finetune.backends.{backend_under_judgement()}.backend"), name, wrong)


def plant_arrays(wrong: WrongArrays) -> None:
    """Plant a fault where a batch becomes arrays.

    `wrong` is given the padding's id, the batch, ids, where targets are (sequences, length), and where each token's
    row starts.
    """

    def arrays(right: Callable[[Batch, int], BatchArrays], batch: Batch, pad_id: int) -> BatchArrays:
        found = right(batch, pad_id)
        ids, targets, here, starts = wrong(pad_id, batch, found.ids, found.here, found.starts)
        positions = np.where(starts == found.starts, found.positions, np.arange(ids.shape[1]) - starts)
        return BatchArrays(ids, targets, here.reshape(ids.shape), starts, positions)

    plant(Batch, "arrays", arrays)


def shifted(ids: Ids, here: Places, starts: Ids, by: int = 1) -> Arrays:
    """The arrays with targets so many places on."""
    return ids, np.roll(ids, -by, axis=1)[here], here.reshape(-1), starts


class Through:
    """A session of which some methods are others."""

    def __init__(self, session: Session, **others: object) -> None:
        self.__dict__.update(others)
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def _backend_of(session: Session) -> str:
    """The backend of a session; "" of one that only watches the loop, which has no gradients."""
    return next((backend for backend, name in _SESSIONS.items() if name == type(session).__name__), "")


def pad_of(session: Any) -> int:
    """The id that a session pads rows with."""
    return int(session.forward_pass.sizes.pad_id if _backend_of(session) == "mlx" else session.pad_id)


def gradients_of(session: Any) -> dict[str, Any]:
    """A copy of what a session has added up."""
    if _backend_of(session) != "torch":
        return {name: gradient + 0 for name, gradient in getattr(session, "gradients", {}).items()}
    named = session.model.named_parameters()
    return {name: tensor.grad.clone() for name, tensor in named if tensor.grad is not None}


def put_gradients(session: Any, gradients: dict[str, Any]) -> None:
    """Let a session have added up these, and no others."""
    if _backend_of(session) != "torch":
        session.gradients = gradients
        return
    for name, tensor in session.model.named_parameters():
        tensor.grad = gradients.get(name)


def forget_moments(session: Any) -> None:
    """Make the optimizer's averages zero."""
    optimizer = session.optimizer
    if _backend_of(session) == "torch":
        for state in optimizer.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        return
    for moments in (optimizer.first, optimizer.second):
        moments.update({name: tensor * 0 for name, tensor in moments.items()})


def forget_steps(session: Any) -> None:
    """Let the optimizer believe that it has made no step."""
    if _backend_of(session) != "torch":
        session.optimizer.steps = 0
        return
    for state in session.optimizer.state.values():
        state["step"].zero_()


def thaw(session: Any) -> None:
    """Let an adapter that was loaded, and is frozen, be trained."""
    backend = _backend_of(session)
    if backend == "torch":
        for name, tensor in session.model.named_parameters():
            tensor.requires_grad_("lora_" in name)
    elif session.adapter is not None and backend == "reference":
        session.trainable = session.adapter.tensors()
    elif session.adapter is not None:
        session._trained = session.adapter.tensors(session.loaded.names)


@contextlib.contextmanager
def trainable(session: Any) -> Iterator[None]:
    """Within this context a frozen adapter can be trained; afterwards it is as it was."""
    if session.trainable_names():
        yield
        return
    thaw(session)
    try:
        yield
    finally:
        put_gradients(session, {})
        if _backend_of(session) == "torch":
            session.model.requires_grad_(requires_grad=False)
        elif _backend_of(session) == "reference":
            session.trainable = {}
        else:
            session._trained = {}
