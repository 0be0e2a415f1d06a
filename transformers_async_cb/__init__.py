"""Asynchronous continuous batching for Hugging Face transformers.

import transformers_async_cb
outputs = model.generate_batch(prompts, generation_config=cfg, async_batching=True)
"""

from .config import AsyncBatchingConfig
from .install import disable, install


__version__ = "0.1.0"
__all__ = ["AsyncBatchingConfig", "__version__", "disable", "install"]

install()
