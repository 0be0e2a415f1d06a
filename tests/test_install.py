"""The flag comes with the import, leaves transformers' own code alone without it, and goes away again."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import greedy, new_model, reference, shared_model
from transformers import ContinuousMixin

import transformers_async_cb
from transformers_async_cb import AsyncBatchingConfig
from transformers_async_cb.manager import AsyncBatchingManager


PROMPT = [5, 6, 7, 8]
ENTRY_POINTS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
NOT_A_FLAG = ["yes", 1, 0, None, [], {}, AsyncBatchingConfig]


@pytest.fixture
def theirs() -> dict[str, Any]:
    """transformers' own functions."""
    transformers_async_cb.disable()
    functions = {name: getattr(ContinuousMixin, name) for name in ENTRY_POINTS}
    functions["destroy"] = ContinuousMixin.destroy_cached_continuous_batching_manager
    transformers_async_cb.install()
    return functions


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, tuple, dict]]]:
    """What reaches transformers' own entry points, which do nothing but note it."""
    transformers_async_cb.disable()
    seen: list[tuple[str, tuple, dict]] = []

    def stand_in(name: str) -> Any:
        def note(self: Any, *args: Any, **kwargs: Any) -> str:
            seen.append((name, args, kwargs))
            return "theirs"

        return note

    with monkeypatch.context() as patched:
        for name in ENTRY_POINTS:
            patched.setattr(ContinuousMixin, name, stand_in(name))
        transformers_async_cb.install()
        yield seen
        transformers_async_cb.disable()
    transformers_async_cb.install()


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    return new_model("llama")


class TestWithoutTheFlag:
    @pytest.mark.parametrize("name", ENTRY_POINTS)
    @pytest.mark.parametrize("flag", [{}, {"async_batching": False}], ids=["absent", "false"])
    def test_transformers_own_code_runs_with_what_it_was_given(self, model, calls, name: str, flag: dict) -> None:
        assert getattr(model, name)(1, "two", three=3, **flag) == "theirs"
        assert calls == [(name, (1, "two"), {"three": 3})]

    @pytest.mark.parametrize("name", ENTRY_POINTS)
    def test_signatures_and_names_are_transformers_own(self, theirs: dict[str, Any], name: str) -> None:
        mine = getattr(ContinuousMixin, name)
        assert mine is not theirs[name]
        assert inspect.signature(mine) == inspect.signature(theirs[name])
        assert mine.__name__ == name
        assert mine.__doc__ == theirs[name].__doc__

    def test_the_manager_is_transformers_own(self, model) -> None:
        manager = model.init_continuous_batching(generation_config=greedy(3))
        assert type(manager).__module__.startswith("transformers.")
        assert not isinstance(manager, AsyncBatchingManager)

    def test_generate_is_not_touched(self) -> None:
        assert transformers.LlamaForCausalLM.generate.__module__.startswith("transformers.")


class TestTheFlag:
    def test_runs_this_engine(self, model, calls) -> None:
        for flag in (True, AsyncBatchingConfig()):
            outputs = model.generate_batch([PROMPT], generation_config=greedy(3), async_batching=flag)
            assert outputs["req_0"].generated_tokens == reference(shared_model("llama"), PROMPT, greedy(3))
            assert isinstance(model.init_continuous_batching(async_batching=flag), AsyncBatchingManager)
        assert calls == []

    @pytest.mark.parametrize("flag", NOT_A_FLAG, ids=repr)
    @pytest.mark.parametrize("name", ENTRY_POINTS)
    def test_must_be_a_bool_or_a_config(self, model, name: str, flag: Any) -> None:
        inputs = ([PROMPT],) if name == "generate_batch" else ()
        with pytest.raises(TypeError, match="async_batching must be True, False or an AsyncBatchingConfig"):
            result = getattr(model, name)(*inputs, async_batching=flag)
            result.__enter__()  # the context manager begins with its block

    def test_is_checked_even_when_there_is_nothing_to_do(self, model) -> None:
        with pytest.raises(TypeError, match="async_batching must be"):
            model.generate_batch([], async_batching="yes")


class TestAsyncBatchingConfig:
    def test_has_defaults(self) -> None:
        config = AsyncBatchingConfig()
        assert (config.overlap, config.attention_backend, config.debug) == (True, "auto", False)

    @pytest.mark.parametrize("backend", ["flash", "", None, "Triton"])
    def test_refuses_a_backend_that_it_does_not_know(self, backend: Any) -> None:
        with pytest.raises(ValueError, match=r"attention_backend=.*choose one of .*reference.*triton"):
            AsyncBatchingConfig(attention_backend=backend)

    def test_refuses_triton_without_cuda_before_anything_runs(self, model) -> None:
        config = AsyncBatchingConfig(attention_backend="triton")
        with pytest.raises(ValueError, match="needs a CUDA device"):
            model.generate_batch([PROMPT], async_batching=config)
        assert model.config._attn_implementation != "async_batching"

    def test_refuses_fields_that_it_does_not_have(self) -> None:
        with pytest.raises(TypeError, match="overlapp"):
            AsyncBatchingConfig(overlapp=True)

    def test_cannot_be_changed_and_compares_by_value(self) -> None:
        config = AsyncBatchingConfig(overlap=False)
        with pytest.raises(AttributeError):
            config.overlap = True
        assert config == AsyncBatchingConfig(overlap=False) != AsyncBatchingConfig()

    @pytest.mark.parametrize("field", ["overlap", "debug"])
    def test_refuses_what_is_not_a_bool(self, field: str) -> None:
        with pytest.raises((TypeError, ValueError), match=field):
            AsyncBatchingConfig(**{field: "no"})


class TestInstalling:
    def test_again_changes_nothing(self) -> None:
        before = dict(vars(ContinuousMixin))
        assert transformers_async_cb.install()
        assert transformers_async_cb.install()
        assert dict(vars(ContinuousMixin)) == before

    def test_can_be_undone_and_done_again(self, theirs: dict[str, Any]) -> None:
        for _ in range(2):
            transformers_async_cb.disable()
            transformers_async_cb.disable()
            for name in ENTRY_POINTS:
                assert getattr(ContinuousMixin, name) is theirs[name]
            assert ContinuousMixin.destroy_cached_continuous_batching_manager is theirs["destroy"]
            assert transformers_async_cb.install()
            for name in ENTRY_POINTS:
                assert getattr(ContinuousMixin, name) is not theirs[name]

    def test_anew_by_reloading_the_package_is_harmless(self, model, theirs: dict[str, Any]) -> None:
        importlib.reload(transformers_async_cb)
        importlib.reload(transformers_async_cb)
        outputs = model.generate_batch([PROMPT], generation_config=greedy(3), async_batching=True)
        assert outputs["req_0"].generated_tokens == reference(shared_model("llama"), PROMPT, greedy(3))
        transformers_async_cb.disable()
        for name in ENTRY_POINTS:
            assert getattr(ContinuousMixin, name) is theirs[name]
        transformers_async_cb.install()

    def test_covers_models_that_were_made_before(self, model) -> None:
        transformers_async_cb.disable()
        transformers_async_cb.install()
        assert model.generate_batch([PROMPT], generation_config=greedy(3), async_batching=True)


@contextmanager
def version(number: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    transformers_async_cb.disable()
    with monkeypatch.context() as patched:
        patched.setattr(transformers, "__version__", number)
        yield
    transformers_async_cb.install()


class TestVersions:
    @pytest.mark.parametrize("number", ["4.57.1", "5.0.0", "5.16.9", "6.0.0", "6.1.0.dev0", "7.0"])
    def test_it_was_not_made_for_get_one_warning_and_no_flag(
        self, number: str, theirs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with version(number, monkeypatch), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert transformers_async_cb.install() is False
            for name in ENTRY_POINTS:
                assert getattr(ContinuousMixin, name) is theirs[name]
            transformers_async_cb.disable()
        assert [warning.category for warning in caught] == [RuntimeWarning]
        message = str(caught[0].message)
        assert f"transformers {number} is installed" in message
        assert "async_batching=True has no effect" in message

    @pytest.mark.parametrize("number", ["5.17.0", "5.17.0.dev0", "5.23.1", "5.99", transformers.__version__])
    def test_it_was_made_for_get_the_flag(self, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with version(number, monkeypatch), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert transformers_async_cb.install() is True

    def test_that_lack_a_name_get_a_warning_that_says_which(self, monkeypatch: pytest.MonkeyPatch) -> None:
        transformers_async_cb.disable()
        name = "transformers.generation.continuous_batching.requests"
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, name, None)
            with pytest.warns(RuntimeWarning, match=r"lacks what it builds on.*requests"):
                assert transformers_async_cb.install() is False
        assert transformers_async_cb.install() is True

    def test_too_old_let_the_import_succeed(self) -> None:
        """In an interpreter of its own, where nothing of the package has been imported."""
        code = (
            "import warnings, transformers; transformers.__version__ = '4.40.0'\n"
            "with warnings.catch_warnings(record=True) as caught:\n"
            "    warnings.simplefilter('always')\n"
            "    import transformers_async_cb\n"
            "ours = [w for w in caught if 'transformers_async_cb' in str(w.message)]\n"
            "assert [w.category for w in ours] == [RuntimeWarning], ours\n"
            "assert 'transformers_async_cb.entry_points' not in __import__('sys').modules\n"
            "print(transformers_async_cb.AsyncBatchingConfig())\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("AsyncBatchingConfig(")


def test_type_checkers_read_the_package() -> None:
    assert (Path(transformers_async_cb.__file__).parent / "py.typed").is_file()
