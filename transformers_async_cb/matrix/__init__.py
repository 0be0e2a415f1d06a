"""Every architecture of the installed transformers against `model.generate`."""

from .processes import judge_all
from .small import TASKS, model_types
from .verdict import FAILING, MODES, Verdict, judge


__all__ = ["FAILING", "MODES", "TASKS", "Verdict", "judge", "judge_all", "model_types"]
