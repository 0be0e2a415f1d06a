"""One step on the device: packed inputs, the model's forward, the next tokens."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from transformers.utils import logging

from .attention import LayerShape, PagedLayer, Place, Step, computing
from .compiling import compiling
from .gpu import side_by_side
from .grammars import mask_words
from .graphs import Graphs, StepKey, worth_a_graph
from .inputs import Bucket, StepArrays, share_out, unpack
from .lanes import Slot
from .logits import SHAPING_WORDS, Call, Tables, mask, shape
from .logprobs import ENTRY_WORDS, MOST_SCORED, RANKED_WORDS, rank
from .model import ModelLoan
from .pages import Pages
from .request import MOST_FRESH, Rows
from .sampling import PARAMETER_WORDS, TRUNCATED_WORDS, Flavour, Parameters, pick, truncate
from .scheduler import Plan
from .settings import EngineSettings


logger = logging.get_logger(f"transformers.{__name__}")


def row_buckets(largest: int) -> list[int]:
    """2, 4, 8, then in steps of an eighth of the power of two below, at least 8. Not 1, which compiles differently."""
    sizes, size = [], 2
    while size < largest:
        sizes.append(size)
        size += size if size < 8 else max(8, 2 ** (size.bit_length() - 4))
    return [*sizes, largest]


def token_buckets(largest: int) -> list[int]:
    """From 64 up in steps of an eighth of the power of two below."""
    sizes, size = [], min(64, largest)
    while size < largest:
        sizes.append(size)
        size += max(8, 2 ** (size.bit_length() - 4))
    return [*sizes, largest]


class Runner:
    """Runs plans on the model.

    On CUDA a step is padded to a bucket, and what was captured is one graph replay: see `Graphs`. Elsewhere it has the
    size of its plan and is computed as it comes.

    Args:
        loan (`ModelLoan`): the model, borrowed.
        shapes (`dict`): what `loan.probe()` found.
        rows (`Rows`): the running requests.
        settings (`EngineSettings`): every size.
    """

    def __init__(self, loan: ModelLoan, shapes: dict[Place, LayerShape], rows: Rows, settings: EngineSettings) -> None:
        self.loan = loan
        self.device = loan.device
        self.rows = rows
        self.layout = settings.layout
        self.page_sizes = [group.page_size for group in self.layout.groups]
        self.with_logprobs = settings.logprobs
        self.pads = self.device.type == "cuda"
        self.backend = settings.backend
        self.fused = settings.fused
        self.compiled = settings.compiled
        self.graphs = Graphs(settings.graphs, worth_a_graph(sum(p.numel() for p in loan.model.parameters())))
        self.warming_up: str | None = None  # what is being compiled or captured, which any thread may read
        self._met: set[StepKey] = set()  # steps that were compiled for, if need be
        self.padding_row = rows.count
        self.row_buckets = row_buckets(rows.count)
        self.mixed_rows = [-(-rows.count // 16), -(-rows.count // 4), rows.count]
        self.token_buckets = token_buckets(settings.token_budget)

        kv_heads = max((shape.kv_heads for shape in shapes.values()), default=1)
        self.programs = max(1, side_by_side(self.device) // kv_heads)
        largest = Bucket(settings.token_budget, rows.count, False)
        self.mask_words = mask_words(loan.vocabulary)
        most_scored = min(MOST_SCORED, settings.token_budget)
        every = Flavour(shaped=True, masked=True, truncated=rows.count, ranked=True, scored=most_scored)
        words = self.words(StepKey(largest, every))
        self.fork_words = 2 + 2 * len(self.page_sizes)  # see `Admission.take_forks`
        self.words_in = words + min(rows.count, MOST_FRESH) * self.fork_words
        self.parts_out = 2 if self.with_logprobs else 1  # ids, their log-probabilities
        self.words_out = rows.count * self.parts_out + largest.entries(every) * RANKED_WORDS

        self._shapes = shapes
        self._pages = settings.pages
        self._debug = settings.debug
        self._baked_in: list = []
        self.layers: dict[Place, PagedLayer] = {}
        self.storages: list[torch.Tensor] = []  # the pages of all layers: [pages, values]
        self.take_pages()  # before anything else lies in what the allocator has cached
        on_device = {"dtype": torch.int32, "device": self.device}
        self.static_in = torch.zeros(words, **on_device)
        self.static_out = torch.zeros(self.words_out, **on_device)
        tables = (len(self.page_sizes), rows.count + 1, settings.columns)
        self.page_tables = torch.full(tables, Pages.PADDING, **on_device)
        self.last_tokens = torch.zeros(rows.count + 1, **on_device)
        self.parameters = torch.zeros(rows.count + 1, PARAMETER_WORDS, **on_device)
        self.tables: Tables | None = None  # made when a request first shapes its logits
        self.counters = torch.zeros(rows.count * kv_heads, **on_device)

    def take_pages(self) -> None:
        """Allocate the pages, if they are not there."""
        if self.layers:
            return
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks that other streams have used are of no use to ours
        for slot in self.layout.slots:
            for size in (slot.key_bytes, slot.value_bytes):
                shape = (self._pages + 1, size // slot.dtype.itemsize)
                self.storages.append(torch.empty(shape, dtype=slot.dtype, device=self.device))
        for storage in self.storages:
            if self._debug:
                storage.fill_(torch.nan)
            storage[Pages.PADDING] = 0
        for place, layer in self._shapes.items():
            self.layers[place] = self._layer(place, layer) if layer.source is None else self.layers[layer.source]

    def release_pages(self) -> None:
        """Free the pages, and what was captured, which points into them. The model must be given back."""
        self.layers.clear()
        self.storages.clear()
        self.graphs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the memory of graphs is nobody else's until then

    def _layer(self, place: Place, layer: LayerShape) -> PagedLayer:
        at = self.layout.stored[place]
        size = (self._pages + 1, self.page_sizes[at.group], layer.kv_heads)
        keys, values = self.storages[2 * at.slot : 2 * at.slot + 2]
        return PagedLayer(
            _part(keys, at.key_offset, (*size, layer.key_dim), layer.dtype),
            _part(values, at.value_offset, (*size, layer.value_dim), layer.dtype),
            at.group,
        )

    def attach(self) -> bool:
        """Give the model's layers their pages. Weights that have moved since the last time, hooks that have come or
        gone, and adapters that were switched void what was captured; returns whether they did."""
        self.take_pages()
        self.loan.attach(self.layers)
        if self.fused:
            self.loan.fuse_products()
        if self.compiled:
            self.loan.compile_layers()
        baked_in = self.loan.baked_in()
        void = baked_in != self._baked_in
        if void:
            self.graphs.clear()
            self._baked_in = baked_in
        return void

    # ------------------------------------------------------------------------------------------------ host

    def key_for(self, plan: Plan) -> StepKey:
        decode_only = plan.decodes == len(plan.rows)
        tokens, rows = plan.tokens, len(plan.rows)
        if self.pads:
            if decode_only:
                tokens = rows = self.row_buckets[np.searchsorted(self.row_buckets, rows)]
            else:
                tokens = self.token_buckets[np.searchsorted(self.token_buckets, tokens)]
                rows = next(size for size in self.mixed_rows if size >= rows)
        return self.graphs.choose(StepKey(Bucket(tokens, rows, decode_only), self.flavour(plan)))

    def flavour(self, plan: Plan) -> Flavour:
        """What the rows of a step need."""
        truncated, scored = len(plan.truncated), plan.scores
        if self.pads and truncated:
            truncated = min(4 ** -(-(truncated - 1).bit_length() // 2), self.rows.count)
        if self.pads and scored:
            scored = min(MOST_SCORED, self.token_buckets[-1])
        ranked = scored > 0 or len(plan.ranked) > 0
        return Flavour(
            plan.sampled, plan.filtered, self.with_logprobs, plan.shaped, plan.masked, truncated, ranked, scored
        )

    def words(self, key: StepKey) -> int:
        """Of the packed inputs of a step."""
        return key.bucket.words(self.page_sizes, self.programs, self.mask_words, key.flavour)

    def words_back(self, plan: Plan, key: StepKey) -> int:
        """Of what comes back from a step: ids, their log-probabilities, answers of `rank`."""
        return key.bucket.rows * self.parts_out + (len(plan.ranked) + plan.scores) * RANKED_WORDS

    def results(
        self, plan: Plan, key: StepKey, out: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """A plan's ids, their log-probabilities, and answers of `rank`, of the words that came back."""
        sequences, rows, at = len(plan.rows), key.bucket.rows, key.bucket.rows * self.parts_out
        logprobs = out[rows : rows + sequences].view(np.float32) if self.with_logprobs else None
        ranked = out[at : self.words_back(plan, key)].reshape(-1, RANKED_WORDS) if key.flavour.ranked else None
        return out[:sequences], logprobs, ranked

    def arrays(self, key: StepKey, buffer: np.ndarray | torch.Tensor) -> StepArrays:
        return StepArrays.of(buffer, key.bucket.sizes(self.page_sizes, self.programs, self.mask_words, key.flavour))

    def stage(self, plan: Plan, key: StepKey, buffer: np.ndarray) -> None:
        """Write a plan's packed inputs into a pinned buffer, padding included, and its forks behind them."""
        words = self.words(key)
        buffer[words : words + plan.forks.size] = plan.forks.reshape(-1)
        a = self.arrays(key, buffer)
        r, decodes, sequences, padding = self.rows, plan.decodes, len(plan.rows), self.padding_row
        a.ids[:decodes] = -1 - plan.rows[:decodes]
        a.positions[:decodes] = plan.starts[:decodes]
        a.token_rows[:decodes] = plan.rows[:decodes]
        at = decodes
        for row, start, count in zip(
            plan.rows[decodes:].tolist(), plan.starts[decodes:].tolist(), plan.counts[decodes:].tolist(), strict=True
        ):
            a.ids[at : at + count] = r.tokens[row, start : start + count]
            a.positions[at : at + count] = np.arange(start, start + count)
            a.token_rows[at : at + count] = row
            at += count
        a.ids[at:] = 0
        a.positions[at:] = 0
        a.token_rows[at:] = padding
        a.rows[:sequences] = plan.rows
        a.rows[sequences:] = padding
        a.query_starts[0] = 0
        np.cumsum(plan.counts, out=a.query_starts[1 : sequences + 1])
        a.query_starts[sequences + 1 :] = at
        a.lengths[:sequences] = plan.starts + plan.counts
        a.lengths[sequences:] = 0
        a.counts[:] = decodes, sequences
        single = self._in_parts(plan, key)
        share_out(a.work, single, a.lengths[single], self.programs)
        a.stores[:sequences] = np.where(plan.samples, plan.rows, padding)
        a.stores[sequences:] = padding
        a.cells[: len(plan.cells)] = plan.cells
        a.cells[len(plan.cells) :] = padding * self.page_tables.shape[2]
        a.pages[: len(plan.pages)] = plan.pages
        a.pages[len(plan.pages) :] = Pages.PADDING
        a.fresh[: len(plan.fresh)] = plan.fresh
        a.fresh[len(plan.fresh) :] = padding
        parameters = a.parameters.reshape(-1, PARAMETER_WORDS)
        parameters[len(plan.fresh) :] = 0
        for line, row in zip(parameters, plan.fresh, strict=False):
            sampling = r.request[row].sampling.picking()
            line.view(np.float32)[:3] = sampling.temperature, sampling.top_p, sampling.min_p
            line[3:] = sampling.top_k, *np.array([sampling.seed], np.uint64).view(np.int32)
        if key.flavour.shaped:
            self._stage_shaped(plan, a)
        if key.flavour.masked:
            self._stage_masks(plan, a)
        if key.flavour.truncated:
            truncated = a.truncated.reshape(-1, TRUNCATED_WORDS)
            truncated[: len(plan.truncated), 0] = plan.truncated
            truncated[: len(plan.truncated), 1:] = r.truncations[plan.rows[plan.truncated]]
            truncated[len(plan.truncated) :] = -1
        if key.flavour.ranked:
            self._stage_ranked(plan, key, a)

    def _in_parts(self, plan: Plan, key: StepKey) -> np.ndarray:
        """Sequences whose keys are cut into parts, to be looked at side by side: those of one token."""
        return np.flatnonzero(plan.counts == 1)

    def _stage_shaped(self, plan: Plan, a: StepArrays) -> None:
        r = self.rows
        shaped = np.flatnonzero(r.shaped[plan.rows] & plan.samples)
        a.shaped[: len(shaped)] = shaped
        a.shaped[len(shaped) :] = -1
        newly_shaped = [row for row in plan.fresh if r.shaped[row]]
        a.newly_shaped[: len(newly_shaped)] = newly_shaped
        a.newly_shaped[len(newly_shaped) :] = self.padding_row
        for line, row in zip(a.shapings.reshape(-1, SHAPING_WORDS), newly_shaped, strict=False):
            words = r.request[row].shaping
            line[: len(words)] = words

    def _stage_masks(self, plan: Plan, a: StepArrays) -> None:
        r = self.rows
        masked = np.flatnonzero(r.masked[plan.rows] & plan.samples)
        a.masked[: len(masked)] = masked
        a.masked[len(masked) :] = -1
        for line, row in zip(a.masks.reshape(-1, self.mask_words), plan.rows[masked].tolist(), strict=False):
            line[:] = r.request[row].constraint.mask

    def calls(self, plan: Plan) -> list[Call]:
        """Of the users' own logits processors in a step."""
        if not plan.processed:
            return []
        r = self.rows
        return [
            Call(i, row := int(plan.rows[i]), int(plan.starts[i] + plan.counts[i]), r.request[row].processors)
            for i in np.flatnonzero(r.processed[plan.rows] & plan.samples).tolist()
        ]

    def _stage_ranked(self, plan: Plan, key: StepKey, a: StepArrays) -> None:
        r, ranked = self.rows, len(plan.ranked)
        entries = a.entries.reshape(-1, ENTRY_WORDS)
        entries[:ranked, 0] = plan.ranked
        entries[:ranked, 1] = -1
        entries[:ranked, 2] = r.likeliest[plan.rows[plan.ranked]]
        at = 0
        for sequence, first, count in plan.scored:
            request, here = r.request[plan.rows[sequence]], slice(at, at + count)
            begin = a.query_starts[sequence] + first - plan.starts[sequence]
            a.scored[here] = np.arange(begin, begin + count)
            of_token = entries[ranked:][here]
            of_token[:, 0] = key.bucket.rows + np.arange(at, at + count)
            of_token[:, 1] = request.tokens[first + 1 : first + count + 1]
            of_token[:, 2] = request.prompt_scores.words.shape[1] // 2
            at += count
        a.scored[at:] = 0
        entries[ranked + at :] = -1

    # ------------------------------------------------------------------------------------------------ device

    def take(self, key: StepKey, slot: Slot, forks: int) -> None:
        """Copy a slot's inputs to where captured steps read them, and make its forks."""
        words = self.words(key)
        self.static_in[:words].copy_(slot.device_in[:words], non_blocking=True)
        if forks:
            self._fork(*slot.device_in[words : words + forks * self.fork_words].view(forks, 2, -1).unbind(1))

    def _fork(self, sources: torch.Tensor, copies: torch.Tensor) -> None:
        """Let rows begin with the page tables and tokens of others, and pages with the contents of others. Not part of
        a captured step: few have forks."""
        from_rows, rows = sources[:, 0], copies[:, 0]
        from_pages, pages = sources[:, 1:].flatten(), copies[:, 1:].flatten()
        self.page_tables[:, rows] = self.page_tables[:, from_rows]
        if self.tables is not None:
            self.tables.history[rows] = self.tables.history[from_rows]
        for storage in self.storages:
            storage[pages] = storage[from_pages]

    def step(self, key: StepKey, slot: Slot, words_back: int, calls: list[Call]) -> None:
        """Compute the step whose inputs were taken; what comes back goes to the slot's `device_out`. With `calls` it
        is not captured: nobody knows what they do."""
        if key.flavour.shaped and self.tables is None:
            self.tables = Tables.of(self.rows.count, self.page_tables.shape[2] * min(self.page_sizes), self.device)
        if calls or not self.captures(key):
            self._compute_uncaptured(key, calls)
        else:
            self.graphs.run(key, lambda: self._compute_uncaptured(key), lambda: self._record(key))
        slot.device_out[:words_back].copy_(self.static_out[:words_back], non_blocking=True)

    def captures(self, key: StepKey) -> bool:
        """Whether a step of this kind may be captured."""
        return True

    def _record(self, key: StepKey) -> None:
        self.warming_up = f"capturing graph {self.graphs.count + 1}, of {key.bucket.tokens} tokens"
        try:
            self._compute(key)
        finally:
            self.warming_up = None

    def _compute_uncaptured(self, key: StepKey, calls: list[Call] | None = None) -> None:
        """Compute a step that is not captured; with layers as they are written if they turn out not to compile."""
        if self.compiled and key not in self._met:
            self._met.add(key)
            self.warming_up = f"compiling for steps of {key.bucket.tokens} tokens"
        try:
            with compiling(self.device) if self.compiled else nullcontext():
                self._compute(key, calls)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not self.loan.run_as_written():
                raise
            self.compiled = False
            logger.warning(
                f"the layers of {type(self.loan.model).__name__} do not compile, they run as they are written: "
                f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            )
            self._compute(key, calls)
        finally:
            self.warming_up = None

    def _compute(self, key: StepKey, calls: list[Call] | None = None) -> None:
        a = self.arrays(key, self.static_in)
        tables = self.tables if key.flavour.shaped else None
        ids, positions, last = unpack(a, self.page_tables, self.parameters, self.last_tokens, tables)
        keep = torch.cat([last, a.scored.long()]) if key.flavour.scored else last
        raw = self._forward(key, a, ids, positions, keep)
        rows, flavour = key.bucket.rows, key.flavour
        logits = raw[:rows]
        if flavour.ranked and (flavour.shaped or flavour.masked or flavour.truncated):  # which write to them
            logits = logits.clone()
        if tables is not None:
            shape(logits, tables, a.shaped, a.rows, a.lengths)
        for call in calls or ():
            call.processors(tables.history[call.row, : call.length].long(), logits[call.sequence])
        if flavour.masked:
            mask(logits, a.masked, a.masks.view(-1, self.mask_words))
        if flavour.truncated:
            truncate(logits, a.truncated)
        parameters = Parameters.from_table(self.parameters[a.rows])
        ids, logprobs = pick(logits, parameters, a.lengths, flavour)
        self.last_tokens[a.stores] = ids
        self.static_out[:rows] = ids
        if logprobs is not None:
            self.static_out[rows : 2 * rows] = logprobs.view(torch.int32)
        if flavour.ranked:
            ranked = rank(raw, a.entries, ids).view(-1)
            self.static_out[rows * self.parts_out :][: len(ranked)] = ranked

    def _forward(
        self, key: StepKey, a: StepArrays, ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        """Logits of the packed tokens at `keep`, which begins with the last of each sequence: `[kept, V]`."""
        steps = [
            Step(
                page_table, a.token_rows, a.positions, a.rows, a.query_starts, a.lengths, a.counts, a.work,
                self.counters, key.bucket.decode_only,
            )
            for page_table in self.page_tables
        ]  # fmt: skip
        with computing(steps, self.backend):
            return self.loan.forward(ids[None], positions[None], keep)

    def rest(self) -> None:
        """Nothing runs and nothing is in flight: what requests left behind may go."""

    def poison(self, pages: np.ndarray) -> None:
        """Fill pages that nobody holds with NaN."""
        index = torch.from_numpy(pages).to(self.device)
        for storage in self.storages:
            storage[index] = torch.nan


def _part(storage: torch.Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """One layer's part of each page: `[pages, page_size, kv_heads, dim]`, from byte `offset` of a page on. As a tensor
    that begins where its memory does, and is nobody's view: a compiler would look at either."""
    strides = (storage[0].nbytes // dtype.itemsize, shape[2] * shape[3], shape[3], 1)
    memory = storage.untyped_storage()
    memory = memory[offset:] if offset else memory
    return torch.empty(0, dtype=dtype, device=storage.device).set_(memory, 0, shape, strides)
