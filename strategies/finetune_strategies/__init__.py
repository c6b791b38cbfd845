"""Hypothesis strategies for FineTune's values; import the module you need, e.g. `finetune_strategies.configs`."""
