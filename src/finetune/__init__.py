"""FineTune: fine-tune language models with LoRA, and prove with measured evidence that it worked.

    import finetune
    result = finetune.train(model="reference-llama", data="rows.jsonl", epochs=3)
    print(result.outcome, result.report)

Importing this loads no library; a backend is loaded when it is used.
"""

import sys
from importlib import import_module
from inspect import Signature, signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.api import FineTuned as FineTuned
    from finetune.api import train as train
    from finetune.config import TrainingConfig as TrainingConfig
    from finetune.config import load_config as load_config
    from finetune.criteria.validator import TrainingSuccessValidator as TrainingSuccessValidator
    from finetune.errors import FineTuneError as FineTuneError
    from finetune.evidence.evaluate import evaluate as evaluate
    from finetune.judge import assert_learned as assert_learned
    from finetune.train import fine_tune as fine_tune

__version__ = "0.1.0"

_EXPORTS = {
    "FineTuneError": "finetune.errors",
    "TrainingConfig": "finetune.config",
    "FineTuned": "finetune.api",
    "TrainingSuccessValidator": "finetune.criteria.validator",
    "assert_learned": "finetune.judge",
    "evaluate": "finetune.evidence.evaluate",
    "fine_tune": "finetune.train",
    "load_config": "finetune.config",
}
__all__ = [
    "FineTuneError",
    "FineTuned",
    "TrainingConfig",
    "TrainingSuccessValidator",
    "__version__",
    "assert_learned",
    "evaluate",
    "fine_tune",
    "load_config",
    "train",
]


class _Trainer(ModuleType):
    """The module `finetune.train`, which can be called."""

    def __call__(self, *given: Any, **settings: Any) -> Any:
        """Fine-tune, judge and report; see `finetune.api.train`."""
        return import_module("finetune.api").train(*given, **settings)

    @property
    def __signature__(self) -> Signature:
        """What an editor and `help` show of its arguments."""
        return signature(import_module("finetune.api").train)


class _Package(ModuleType):
    """The package itself: its submodule `train` is the function of that name, too, whichever is imported first."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "train" and isinstance(value, ModuleType):
            value.__class__ = _Trainer
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import finetune` loads nothing heavy."""
    if name == "train":
        return import_module("finetune.train")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return sorted(__all__)
