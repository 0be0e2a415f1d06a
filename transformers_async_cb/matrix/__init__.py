"""Every architecture of the installed transformers against `model.generate`."""

from .processes import judge_all
from .small import model_types
from .verdict import FAILING, MODES, Verdict, judge


__all__ = ["FAILING", "MODES", "Verdict", "judge", "judge_all", "model_types"]
