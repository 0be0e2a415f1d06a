"""What a user may set."""

from __future__ import annotations

from dataclasses import dataclass

from .timeline import check_file


ATTENTION_BACKENDS = ("auto", "reference", "triton")


@dataclass(frozen=True)
class AsyncBatchingConfig:
    """Settings that only this engine has; pass it in place of `True`: `async_batching=AsyncBatchingConfig(...)`.

    Everything that transformers' own batching can be told stays in `ContinuousBatchingConfig` and `GenerationConfig`.

    Args:
        overlap (`bool`, *optional*, defaults to `True`):
            Prepare and launch batch N+1 while batch N computes. `False` keeps one batch in flight: the same engine
            without the overlap, to measure what the overlap is worth.
        attention_backend (`str`, *optional*, defaults to `"auto"`):
            `"triton"` (CUDA), `"reference"` (plain torch, any device), or `"auto"`: Triton on CUDA where it is
            installed, the reference elsewhere.
        compile_layers (`bool`, *optional*):
            Compile the model's repeated layers with `torch.compile`, all of them as one: seconds once for a model, and
            fewer and larger kernels from then on. By default on CUDA, and not elsewhere. Layers that do not compile
            run as they are written.
        fuse_projections (`bool`, *optional*):
            Compute projections that read the same tensor (query, key and value; gate and up) as one product, and
            products of few rows on a kernel of ours. By default on CUDA, and not elsewhere. The parameters stay the
            objects they are, but their data move to joined storage while the engine lives.
        timeline (`str`, *optional*):
            A file for what the host and the device did in each step, written when generation has ended: a trace that
            https://ui.perfetto.dev opens (`.json`), or a picture (`.png`, `.svg`, `.pdf`; needs matplotlib). Of a long
            run, the last 16,384 steps. `manager.trace(file)` does the same for a part of a run.
        sequential_fallback (`bool`, *optional*, defaults to `True`):
            Run a model whose sequences cannot be batched one at a time, as `generate` does: slow, and said in the log.
            `False` refuses such a model.
        one_at_a_time (`bool`, *optional*, defaults to `False`):
            Run one sequence at a time though they could be batched. A manager that is to take requests with inputs
            beside token ids (images) while it runs needs it; `generate_batch` sees by itself.
        self_check (`bool`, *optional*, defaults to `True`):
            Before a model first runs batched, compare the logits of a few tokens with those that `generate` gets. A
            model that has passed is remembered by its class, config and versions, in a file in Hugging Face's cache
            directory if the check took long.
        debug (`bool`, *optional*, defaults to `False`):
            Fill pages that are given back with NaN and staging buffers with -1, so that a read after release shows
            in the results. Slow.
    """

    overlap: bool = True
    attention_backend: str = "auto"
    compile_layers: bool | None = None
    fuse_projections: bool | None = None
    timeline: str | None = None
    sequential_fallback: bool = True
    one_at_a_time: bool = False
    self_check: bool = True
    debug: bool = False

    def __post_init__(self) -> None:
        may_be_none = ("compile_layers", "fuse_projections")
        always = ("overlap", "sequential_fallback", "one_at_a_time", "self_check", "debug")
        for name in (*may_be_none, *always):
            value = getattr(self, name)
            if not (isinstance(value, bool) or (value is None and name in may_be_none)):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if self.attention_backend not in ATTENTION_BACKENDS:
            raise ValueError(
                f"attention_backend={self.attention_backend!r} is not known: choose one of {ATTENTION_BACKENDS}"
            )
        if self.timeline is not None:
            check_file(self.timeline)

    @classmethod
    def from_flag(cls, flag: bool | AsyncBatchingConfig) -> AsyncBatchingConfig:
        """What `async_batching=` was given, as a config. Raises `TypeError` for anything but a bool or a config."""
        if isinstance(flag, cls):
            return flag
        if flag is True:
            return cls()
        raise TypeError(f"async_batching must be True, False or an AsyncBatchingConfig, got {flag!r}")
