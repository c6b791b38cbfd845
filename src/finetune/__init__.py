"""FineTune: fine-tune language models with LoRA, and prove with measured evidence that it worked."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "FineTuneError": "finetune.errors",
    "TrainingConfig": "finetune.config",
    "TrainingSuccessValidator": "finetune.criteria.validator",
    "evaluate": "finetune.evidence.evaluate",
    "fine_tune": "finetune.train",
    "load_config": "finetune.config",
}
__all__ = [
    "FineTuneError",
    "TrainingConfig",
    "TrainingSuccessValidator",
    "__version__",
    "evaluate",
    "fine_tune",
    "load_config",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import finetune` loads nothing heavy."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
