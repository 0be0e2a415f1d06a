"""Models judged in a process each, so that none can disturb the others, whatever it does."""

from __future__ import annotations

import multiprocessing
import os
import resource
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext

from . import verdict
from .verdict import Verdict


# Bytes that the process of a model may take, beside code.
MOST_MEMORY = 4 * 2**30


def judge_all(names: Iterable[str], jobs: int = 1, patience: float = 120) -> Iterator[Verdict]:
    """Verdicts as they come.

    Args:
        names (`Iterable[str]`): model types.
        jobs (`int`): processes side by side.
        patience (`float`): seconds, after which a process is ended.
    """
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([verdict.__name__])  # imported once, for all of them
    with ThreadPoolExecutor(jobs) as threads:
        for judged in as_completed([threads.submit(_judge_in_process, processes, name, patience) for name in names]):
            yield judged.result()


def _judge_in_process(processes: BaseContext, name: str, patience: float) -> Verdict:
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_send_verdict, args=(name, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(patience):
            return Verdict(name, "failed", f"did not end within {patience:g} s", seconds=patience)
        judged = receiver.recv()
        process.join(patience)
        return judged
    except EOFError:
        process.join()
        return Verdict(name, "failed", f"its process ended with exit code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _send_verdict(name: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # some models have much to say about small configs
    os.dup2(nowhere, 2)
    sender.send(verdict.judge(name))
