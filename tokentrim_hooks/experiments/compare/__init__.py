"""Paired comparison of settings over one model: ``tokentrim compare``. What a model must offer is in ``trials.py``."""

from tokentrim_hooks.experiments.compare.settings import STANDARD, Setting, parse_setting
from tokentrim_hooks.experiments.compare.trials import Column, Trial

__all__ = ["STANDARD", "Column", "Setting", "Trial", "parse_setting"]
