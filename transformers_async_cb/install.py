"""Adds `async_batching=` to transformers' entry points, and takes it away again."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import transformers
from packaging.version import Version


OLDEST, NEWEST = Version("5.17"), Version("6")

_originals: dict[str, Callable] = {}


def install() -> bool:
    """Let `generate_batch`, `init_continuous_batching` and `continuous_batching_context_manager` take the flag.

    Importing the package calls this; calling it again changes nothing. Returns whether the flag is there: with a
    transformers it was not made for, it warns and leaves everything alone.
    """
    if _originals:
        return True
    problem = _unfit()
    if problem is not None:
        warnings.warn(
            f"transformers_async_cb is not active: {problem}. It works with transformers >={OLDEST}, <{NEWEST}; "
            "async_batching=True has no effect.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False

    from . import entry_points

    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        _replace(name, _with_flag(getattr(transformers.ContinuousMixin, name), getattr(entry_points, name)))
    name = "destroy_cached_continuous_batching_manager"
    _replace(name, _destroying_both(getattr(transformers.ContinuousMixin, name), entry_points.destroy_cached_manager))
    return True


def disable() -> None:
    """Take the flag away: transformers' entry points are its own again. `install()` brings it back."""
    for name, original in _originals.items():
        setattr(transformers.ContinuousMixin, name, original)
    _originals.clear()


def _unfit() -> str | None:
    version = Version(transformers.__version__)
    if not OLDEST <= Version(version.base_version) < NEWEST:
        return f"transformers {version} is installed"
    try:
        from transformers import AttentionInterface, ContinuousBatchingConfig, ContinuousMixin  # noqa: F401
        from transformers.generation.continuous_batching import RequestStatus  # noqa: F401
        from transformers.generation.continuous_batching.requests import GenerationOutput  # noqa: F401
    except ImportError as error:
        return f"transformers {version} lacks what it builds on ({error})"
    return None


def _replace(name: str, function: Callable) -> None:
    _originals[name] = vars(transformers.ContinuousMixin)[name]
    setattr(transformers.ContinuousMixin, name, function)


def _with_flag(theirs: Callable, ours: Callable) -> Callable:
    @functools.wraps(theirs)
    def entry_point(self: Any, *args: Any, async_batching: Any = False, **kwargs: Any) -> Any:
        if async_batching is False:
            return theirs(self, *args, **kwargs)
        return ours(self, *args, async_batching=async_batching, **kwargs)

    return entry_point


def _destroying_both(theirs: Callable, ours: Callable) -> Callable:
    @functools.wraps(theirs)
    def entry_point(self: Any) -> None:
        ours(self)
        theirs(self)

    return entry_point
