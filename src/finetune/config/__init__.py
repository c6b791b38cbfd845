"""Load a configuration and settle it into a plan.

    load_config(path, environ=..., overrides=..., profile=...)  ->  LoadedConfig   every problem at once
    resolve(loaded, facts)  ->  Plan, then resolve_training(plan, ...) and resolve_steps(plan, total_steps)  ->  Plan
    dump_plan(plan)  <->  load_plan(path)

Importing this loads pydantic and PyYAML and nothing heavier.
"""

from finetune.config.commented import commented_config, json_schema
from finetune.config.keys import KEYS, default_of, description_of, flatten, nearest_assignment, nearest_key, unflatten
from finetune.config.load import LoadedConfig, Origin, load_config, parse_assignments
from finetune.config.plan_file import FORMAT, dump_plan, load_plan, plan_as_list
from finetune.config.profiles import PROFILES, Profile
from finetune.config.resolve import (
    ModelAndDataFacts,
    Plan,
    early_stopping_without_validation_problems,
    new_token_problems,
    resolve,
    resolve_processes,
    resolve_steps,
    resolve_training,
)
from finetune.config.schema import Goal, TrainingConfig

__all__ = [
    "FORMAT",
    "KEYS",
    "PROFILES",
    "Goal",
    "LoadedConfig",
    "ModelAndDataFacts",
    "Origin",
    "Plan",
    "Profile",
    "TrainingConfig",
    "commented_config",
    "default_of",
    "description_of",
    "dump_plan",
    "early_stopping_without_validation_problems",
    "flatten",
    "json_schema",
    "load_config",
    "load_plan",
    "nearest_assignment",
    "nearest_key",
    "new_token_problems",
    "parse_assignments",
    "plan_as_list",
    "resolve",
    "resolve_processes",
    "resolve_steps",
    "resolve_training",
    "unflatten",
]
