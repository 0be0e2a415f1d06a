"""Three lanes, two slots, and the events that order them."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch


class Event(Protocol):
    """A point in a lane's work."""

    def synchronize(self) -> None:
        """Block the calling thread until the lane got there; raise what made the lane fail."""

    def query(self) -> bool:
        """Whether the lane got there; raise what made the lane fail."""

    def seconds_after(self, earlier: Event) -> float:
        """From one event that has passed to this one, which has too; both were recorded as `timed`."""


class Lane(Protocol):
    """Work done one piece after another, in the order given, beside the calling thread."""

    here: bool  # the calling thread does the work of this lane
    alive: bool  # somebody does

    def run(self, work: Callable[[], None]) -> None: ...

    def record(self, timed: bool = False) -> Event: ...

    def wait(self, event: Event | None) -> None:
        """Hold back all later work until `event`; `None` is an event that has passed."""

    def close(self) -> None: ...


class CudaEvent(torch.cuda.Event):
    def seconds_after(self, earlier: CudaEvent) -> float:
        return earlier.elapsed_time(self) / 1e3


class CudaLane:
    """A CUDA stream. `run` enqueues: the work's kernels are on the stream when it returns.

    The streams of lanes that were closed are used again: for each that it meets, cuBLAS keeps 32 MiB (on Hopper) as
    long as the process lives.
    """

    here, alive = False, True  # the device does it

    _spare: ClassVar[defaultdict[torch.device, list[torch.cuda.Stream]]] = defaultdict(list)

    def __init__(self, device: torch.device) -> None:
        try:
            self.stream = self._spare[device].pop()
        except IndexError:
            self.stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self.stream):
            work()

    def record(self, timed: bool = False) -> Event:
        event = CudaEvent(enable_timing=timed)
        event.record(self.stream)
        return event

    def wait(self, event: Event | None) -> None:
        if event is not None:
            self.stream.wait_event(event)

    def close(self) -> None:
        self.stream.synchronize()
        self._spare[self.stream.device].append(self.stream)


class HostEvent:
    def __init__(self, reached: Future) -> None:
        self._reached = reached

    def synchronize(self) -> None:
        self._reached.result()

    def query(self) -> bool:
        return self._reached.done() and self._reached.result() is not None

    def seconds_after(self, earlier: HostEvent) -> float:
        return self._reached.result() - earlier._reached.result()


class HostLane:
    """One thread that does what a stream does. After the first piece of work that fails, none is done any more.

    Not an executor's thread: those take no more work once the interpreter begins to exit, when a loop may still run.
    """

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(
            target=_do_all, args=(self._queue,), name=f"async-batching-{name}", daemon=True
        )
        self._thread.start()
        self._error: BaseException | None = None

    @property
    def here(self) -> bool:
        return threading.current_thread() is self._thread

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def run(self, work: Callable[[], None]) -> None:
        self._queue.put(lambda: self._do(work))

    def record(self, timed: bool = False) -> Event:
        reached: Future = Future()
        self._queue.put(lambda: self._arrive(reached))
        return HostEvent(reached)

    def wait(self, event: Event | None) -> None:
        if event is not None:
            self.run(event.synchronize)

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def __del__(self) -> None:
        self._queue.put(None)  # nobody can give it work any more

    def _do(self, work: Callable[[], None]) -> None:
        if self._error is None:
            try:
                with torch.no_grad():
                    work()
            except BaseException as error:
                self._error = error

    def _arrive(self, reached: Future) -> None:
        if self._error is None:
            reached.set_result(time.perf_counter())
        else:
            reached.set_exception(self._error)


def _do_all(queue: SimpleQueue) -> None:
    while (work := queue.get()) is not None:
        work()
        del work  # which holds its lane


class Marks(NamedTuple):
    """When a step began and ended on each lane, as timed events; waiting for another lane comes before the begin."""

    copy_in: tuple[Event, Event]
    compute: tuple[Event, Event]
    copy_out: tuple[Event, Event]


class Slot:
    """The buffers of one step on its way in and out, and the last event of each.

    Args:
        words_in (`int`), words_out (`int`): sizes, in int32 words.
        device (`torch.device`): where the step computes; host buffers are pinned if it is a CUDA device.
    """

    def __init__(self, words_in: int, words_out: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.host_in = torch.empty(words_in, dtype=torch.int32, device="cpu", pin_memory=pinned)
        self.host_out = torch.empty(words_out, dtype=torch.int32, device="cpu", pin_memory=pinned)
        self.device_in = torch.empty(words_in, dtype=torch.int32, device=device)
        self.device_out = torch.empty(words_out, dtype=torch.int32, device=device)
        self.array_in: np.ndarray = self.host_in.numpy()
        self.array_out: np.ndarray = self.host_out.numpy()
        self.marks: Marks | None = None  # of the last step that was launched with `marked`
        self.began: Event | None = None  # the compute lane turns to this step
        self.staged: Event | None = None  # host_in has been read, device_in is written
        self.consumed: Event | None = None  # device_in has been read
        self.computed: Event | None = None  # device_out is written
        self.returned: Event | None = None  # device_out has been read, host_out is written


class Lanes:
    """Two slots used in turn, so that one step travels while another computes.

        CPU       stage N+1 │ launch N+1 │ collect N ............│ stage N+2 │ ...
        copy-in             └─ N+1 ─► staged
        compute   ───── step N ─────► computed ┃ wait staged: take N+1 ─► consumed ── step N+1 ──► computed
        copy-out                      └─ wait computed: N ─► returned

    Every edge, for the buffers of slot s:

    | buffer       | written by     | may be rewritten when                          | kept by                      |
    |--------------|----------------|------------------------------------------------|------------------------------|
    | `host_in`    | CPU            | the copy-in that read it is done               | `stage` blocks on `staged`   |
    | `device_in`  | copy-in lane   | compute has taken it into its static inputs    | copy-in waits for `consumed` |
    | static input | compute lane   | the step that reads it is done                 | the lane's own order         |
    | `device_out` | compute lane   | the copy-out that read it is done              | compute waits for `returned` |
    | `host_out`   | copy-out lane  | the CPU has collected it                       | `launch` asserts it          |

    and for the reads: compute waits for `staged`, copy-out for `computed`, the CPU (in `collect`) for `returned`.
    What lives longer than a step (page table, last tokens, sampling parameters, the cache) is touched by the compute
    lane alone, in its order; what `PageCopies` touches of it, that one states.

    Args:
        device (`torch.device`): CUDA gives streams and pinned memory, anything else one thread a lane.
        words_in (`int`), words_out (`int`): the largest step, in int32 words.
        poison (`bool`): fill `host_in` with -1 before it is staged.
    """

    DEPTH = 2

    def __init__(self, device: torch.device, words_in: int, words_out: int, poison: bool = False) -> None:
        self.device = device
        self._all: list[Lane] = []
        self.copy_in, self.compute, self.copy_out = (self.add(name) for name in ("copy-in", "compute", "copy-out"))
        self._poison = poison
        self._slots = [Slot(words_in, words_out, device) for _ in range(self.DEPTH)]
        self._turn = 0
        self._uncollected = 0
        self.enter()
        if device.type == "cuda":  # the slots were allocated on the caller's stream
            torch.cuda.current_stream(device).synchronize()

    def add(self, name: str) -> Lane:
        """Another lane, which begins and ends with these."""
        lane = CudaLane(self.device) if self.device.type == "cuda" else HostLane(name)
        self._all.append(lane)
        return lane

    @property
    def here(self) -> bool:
        """Whether the calling thread is one of the lanes'."""
        return any(lane.here for lane in self._all)

    @property
    def alive(self) -> bool:
        """Whether their work is done: in a child of `os.fork` there are no threads of the parent's."""
        return all(lane.alive for lane in self._all)

    def enter(self) -> None:
        """Order all later work of the lanes after what the calling thread has enqueued on its current stream."""
        if self.device.type == "cuda":
            event = torch.cuda.current_stream(self.device).record_event()
            for lane in self._all:
                lane.wait(event)

    def stage(self) -> Slot:
        """The slot whose turn it is, `array_in` free to be written."""
        slot = self._slots[self._turn]
        if slot.staged is not None:
            slot.staged.synchronize()
        if self._poison:
            slot.array_in.fill(-1)
        return slot

    def launch(
        self,
        slot: Slot,
        words_in: int,
        words_out: int,
        take: Callable[[], None],
        step: Callable[[], None],
        marked: bool = False,
    ) -> None:
        """Send a staged slot on its way: copy in, `take`, `step`, copy out. Returns at once.

        Args:
            words_in (`int`), words_out (`int`): how much of the slot's buffers this step uses.
            take (`Callable`): on the compute lane, copies `device_in` into static inputs.
            step (`Callable`): on the compute lane, computes and writes `device_out`.
            marked (`bool`): note in `slot.marks` when the step begins and ends on each lane.
        """
        assert self._uncollected < self.DEPTH, "a slot was launched again before its step was collected"
        self._uncollected += 1
        self._turn = (self._turn + 1) % self.DEPTH

        self.copy_in.wait(slot.consumed)
        arriving = self.copy_in.record(timed=True) if marked else None
        self.copy_in.run(lambda: slot.device_in[:words_in].copy_(slot.host_in[:words_in], non_blocking=True))
        slot.staged = self.copy_in.record(timed=marked)

        self.compute.wait(slot.staged)
        slot.began = self.compute.record(timed=True)
        self.compute.run(take)
        slot.consumed = self.compute.record()
        self.compute.wait(slot.returned)
        self.compute.run(step)
        slot.computed = self.compute.record(timed=True)

        self.copy_out.wait(slot.computed)
        leaving = self.copy_out.record(timed=True) if marked else None
        self.copy_out.run(lambda: slot.host_out[:words_out].copy_(slot.device_out[:words_out], non_blocking=True))
        slot.returned = self.copy_out.record(timed=marked)
        slot.marks = (
            Marks((arriving, slot.staged), (slot.began, slot.computed), (leaving, slot.returned)) if marked else None
        )

    def now(self) -> tuple[Event, float]:
        """An event that has just passed, and when: seconds of `time.perf_counter`. Waits for the compute lane."""
        event = self.compute.record(timed=True)
        event.synchronize()
        return event, time.perf_counter()

    def collect(self, slot: Slot) -> np.ndarray:
        """Wait for a launched slot's results: int32, valid until the slot is launched again."""
        slot.returned.synchronize()
        self._uncollected -= 1
        return slot.array_out

    @staticmethod
    def seconds(slot: Slot) -> float:
        """How long the step that was just collected was on the compute lane."""
        return slot.computed.seconds_after(slot.began)

    def close(self) -> None:
        for lane in reversed(self._all):  # so that the next ones get the streams that were used for the same
            lane.close()
