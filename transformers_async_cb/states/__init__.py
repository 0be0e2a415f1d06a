"""Models that keep a state of each sequence, of one size whatever its length: recurrences, convolutions, hybrids."""

from .kept import Kept
from .runner import StateRunner, resolve_states


__all__ = ["Kept", "StateRunner", "resolve_states"]
