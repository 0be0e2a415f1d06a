"""Asynchronous continuous batching for Hugging Face transformers.

import transformers_async_cb
outputs = model.generate_batch(prompts, generation_config=cfg, async_batching=True)
"""

from typing import TYPE_CHECKING, Any

from .config import AsyncBatchingConfig
from .install import disable, install


__version__ = "0.1.0"
__all__ = ["AsyncBatchingConfig", "__version__", "disable", "generate", "install"]

install()

if TYPE_CHECKING:
    from .custom_generate import generate
else:

    def __getattr__(name: str) -> Any:
        if name == "generate":  # not before `install` knows whether this transformers has what it builds on
            from .custom_generate import generate

            return generate
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
