"""What kernels ask of the device they run on."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


@functools.lru_cache
def triton_error() -> ImportError | None:
    """Why triton cannot be imported, `None` if it can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return error
    return None


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether kernels in Triton can compute with this tensor."""
    return tensor.is_cuda and tensor.dtype.itemsize <= 4 and triton_error() is None


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; a small number where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


def compile_together(device: torch.device, *calls: tuple[Any, tuple, dict[str, Any]]) -> None:
    """Compile kernels in Triton for calls to come, each on a thread of its own: most of the time LLVM, ptxas and a C
    compiler work, and do not hold the interpreter's lock.

    Args:
        calls: kernel, positional arguments and keyword arguments of each.
    """
    import triton

    with ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,)) as threads:
        with triton.AsyncCompileMode(threads):
            made = [kernel.warmup(*arguments, grid=(1,), **options) for kernel, arguments, options in calls]
        compiled = [each.result() if isinstance(each, triton.FutureKernel) else each for each in made]
        list(threads.map(lambda kernel: kernel.run, compiled))  # which makes what launches it


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate through torch: what is free, within the fraction that the user allows
    torch, and what the allocator has cached."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = total * torch.cuda.get_per_process_memory_fraction(device)
    return max(0, int(min(free, allowed - reserved)) + reserved - torch.cuda.memory_allocated(device))


def side_by_side(device: torch.device) -> int:
    """Programs of decode attention that run at once. With heads of 128 each keeps 228 registers for each of its 32
    threads, so eight of them share the registers of a multiprocessor."""
    return 8 * multiprocessors(device)


@functools.lru_cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel may be on its way while the one before it ends: programmatic dependent launch
    (https://docs.nvidia.com/cuda/cuda-c-programming-guide/#programmatic-dependent-launch-and-synchronization).

    Every program of such a kernel waits (`gdc_wait`) for the one before it, which has waited for the one before that,
    and so on: after it, all that is older is done. What it reads or writes ahead of it may be nothing that a kernel of
    the same step has written. It lets the next one start (`gdc_launch_dependents`) before or after: see `compiling`.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def early(device: torch.device) -> dict[str, bool]:
    """Launch arguments of a kernel that takes `EARLY`."""
    return {"EARLY": True, "launch_pdl": True} if starts_early(device) else {"EARLY": False}
