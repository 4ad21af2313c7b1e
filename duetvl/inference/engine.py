"""The engine: answers many requests at a time over one cache, and returns tokens as they are generated.

`step` runs one pass, on the thread that calls it. Programs that only need answers call `generate`. For streams the
engine starts a thread of its own, and then nothing else may run the model, because MindSpore must be used by one thread
only. `submit` and `cancel` may be called from any thread.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from duetvl.core.errors import ConfigError, DataError, DuetvlError, did_you_mean
from duetvl.data.tokenizer import TextTokenizer
from duetvl.inference.blocks import BlockPool
from duetvl.inference.defaults import Defaults
from duetvl.inference.delivery import Delivery
from duetvl.inference.jobs import Job, make_jobs, masks_of
from duetvl.inference.lead import Lead
from duetvl.inference.padding import find_padding
from duetvl.inference.passes import pack
from duetvl.inference.request import Completion, Delta, Finish, Request
from duetvl.inference.room import Room, pool_blocks
from duetvl.inference.runner import Generator, Runner
from duetvl.inference.sampling import Chosen, choose_rows
from duetvl.inference.scheduler import Limits, PassPlan, Scheduler
from duetvl.inference.vision_cache import VisionCache

Tensor = Any
Tell = Callable[[Delta], None]


class Engine:
    """Answers requests with one model, and with adapters that share its weights.

    The model's weights must not change during the engine's lifetime, because its cache depends on them.
    """

    def __init__(
        self,
        model: Generator,
        *,
        adapters: Mapping[str, Generator] | None = None,
        tokenizer: TextTokenizer | None = None,
        defaults: Defaults | None = None,
        cache_tokens: int | None = None,
        cache_bytes: int | None = None,
        media_tokens: int = 16384,
        context: int | None = None,
        pass_tokens: int = 2048,
        pass_patches: int = 16384,
        max_sequences: int = 64,
        reuse: bool = True,
        steady: bool = True,
        record: bool = True,
        lead: Lead | None = None,
    ):
        """`tokenizer`: with one, answers have text and stop strings are checked. `defaults`: sampling and end tokens of
        requests that do not set them; without it such requests are greedy and have no end token.

        cache_tokens or cache_bytes: size of the key-value cache, rounded to blocks; by default 90% of the free memory
        (25% on a CPU) minus the largest pass. media_tokens: size of the cache of merged features. context: maximum rows
        of a sequence, by default the model's. A pass has at most `pass_tokens` rows of at most `max_sequences`
        sequences, and `pass_patches` patches, or one larger medium, in the vision tower. reuse: cached rows of earlier
        prompts are used. steady: if the backend supports it, answers are bit-identical whatever else is in a pass.
        record: where the backend can, decoding is recorded, and repeated by the device; not over ranks.
        lead: tells the other ranks that have parts of the model what to run; cache_bytes are then those of each rank.
        """
        self.models = {"": model, **(adapters or {})}
        self.tokenizer, self.defaults = tokenizer, defaults or Defaults()
        self.limits = Limits(pass_tokens, min(max_sequences, pass_tokens), pass_patches)
        self.context = model.context if context is None else context
        room = Room(cache_tokens, cache_bytes, media_tokens)
        backend = model.backend
        record = record and lead is None
        recorded = self.limits.max_sequences if record else 0
        self.padding = find_padding(backend, model.dtype, steady=steady, recorded=recorded)
        spare = self.padding.most if self.padding else 0
        asked = room, self.limits, self.context, spare
        blocks = pool_blocks(model, *asked) if lead is None else lead.open(model, *asked)
        kv_cache = backend.kv_cache
        vision = VisionCache(media_tokens)
        pool = BlockPool(blocks, consecutive=kv_cache.consecutive)
        self.scheduler = Scheduler(pool, vision, kv_cache.block_size, self.limits, reuse=reuse)
        self.runner, self.lead = Runner(self.models, blocks + spare, record=record), lead
        self._opened = lead.opened if lead else 0
        self.ran_pass: Callable[[int], None] | None = None  # told the rows of each pass, on the thread that runs it
        self._ops, self._vocabulary = backend.ops, model.family.vocabulary
        self._changed = threading.Condition()  # holds for the six below
        self._arrivals: list[list[Job]] = []
        self._cancelled: set[str] = set()
        self._known: dict[str, Tell | None] = {}  # requests that are not finished, and what takes their deltas
        self._left: dict[str, int] = {}  # choices of them that are not finished
        self._numbers = 0
        self._stopping = False
        self._jobs: dict[int, Job] = {}  # by the number of their sequence
        self._timed: dict[int, Job] = {}  # those with a deadline
        self._kept: list[Delta] = []  # not yet given to anybody
        self._thread: threading.Thread | None = None

    # -- requests -----------------------------------------------------------------------------------------------------

    def submit(self, request: Request, tell: Tell | None = None) -> str:
        """Queue a request and return its id, which is generated if it has none.

        `tell` is called with the request's deltas, on the thread that runs the engine; without it `step` returns them.
        Raises DataError or ConfigError if the request can never be answered.
        """
        with self._changed:
            first = self._numbers
            self._numbers += request.n
        request = replace(request, id=request.id or f"request {first}")
        try:
            jobs = self._prepared(request, first)
        except DuetvlError as error:
            raise type(error)(f"{request.id}: {error}") from None
        with self._changed:
            if self._stopping:
                raise ConfigError(f"{request.id}: the engine is closed")
            if request.id in self._known:
                raise ConfigError(f"{request.id}: a request with this id is running; use unique ids")
            self._known[request.id] = tell
            self._left[request.id] = request.n
            self._arrivals.append(jobs)
            self._changed.notify_all()
        return request.id

    def cancel(self, id: str) -> None:
        """End a request as it is; no effect if it is not running."""
        with self._changed:
            if id in self._known:
                self._cancelled.add(id)
                self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._known)

    @property
    def longest(self) -> int:
        """Maximum number of tokens of a prompt and its answer: the context, or what fits into the cache."""
        return min(self.context, self.scheduler.pool.size * self.scheduler.block_size)

    @property
    def stopped(self) -> bool:
        """Whether it accepts no more requests: it was closed, or its thread or another rank ended with an error."""
        return self._stopping or (self.lead is not None and self.lead.over)

    def _prepared(self, request: Request, first: int) -> list[Job]:
        model = self.models.get(request.adapter)
        if model is None:
            raise ConfigError(f"no adapter {request.adapter!r}{did_you_mean(request.adapter, self.models)}")
        sampling = self.defaults.sampling if request.sampling is None else request.sampling
        sampling.check_tokens(self._vocabulary)
        ends = self.defaults.stop_ids if request.stop_ids is None else request.stop_ids
        request = replace(request, sampling=sampling, stop_ids=frozenset(ends))
        placed = model.family.place(request.prompt)
        tokens = len(request.prompt)
        if tokens >= self.context:
            raise DataError(f"the prompt has {tokens} tokens, the context is {self.context}: shorten it")
        most = min(request.max_new_tokens, self.context - tokens)
        request = replace(request, max_new_tokens=most, min_new_tokens=min(request.min_new_tokens, most))
        jobs = make_jobs(request, placed, first, self.scheduler.block_size, self.tokenizer)
        self._check_fits(jobs[0])
        return jobs

    def _check_fits(self, job: Job) -> None:
        """Raise ConfigError for what never fits, even alone."""
        sequence, pool, vision = job.sequence, self.scheduler.pool, self.scheduler.vision
        if not self.scheduler.fits(sequence):
            raise ConfigError(
                f"{len(sequence.ids)} tokens of the prompt and {job.request.max_new_tokens} new ones do not fit into "
                f"the cache, which has {pool.size} blocks of {self.scheduler.block_size} tokens: ask for fewer new "
                f"ones, or make the engine with a larger cache"
            )
        largest = max(sequence.media, key=lambda medium: medium.tokens, default=None)
        if largest is not None and largest.tokens > vision.room:
            raise ConfigError(
                f"a picture or video makes {largest.tokens} tokens, and the engine keeps the features of {vision.room} "
                f"(media_tokens): shrink it, or make the engine with more"
            )

    # -- steps --------------------------------------------------------------------------------------------------------

    def step(self) -> list[Delta]:
        """Run one pass, if there is anything to do; returns what it added to requests without `tell`.

        Must not be called while the engine's thread runs. A request that fails ends with its error; others continue.
        """
        if self._thread is not None and threading.current_thread() is not self._thread:
            raise ConfigError("the engine's own thread runs it: use `generate`, `stream` or `submit` with `tell`")
        self._receive()
        self._expire()
        plan = self.scheduler.next()
        if plan is not None:
            self._run(plan)
        assert plan is not None or not self._jobs, "sequences are under way and none can go on"
        kept, self._kept = self._kept, []
        return kept

    def _receive(self) -> None:
        """Take what was submitted and cancelled."""
        with self._changed:
            arrivals, self._arrivals = self._arrivals, []
            cancelled, self._cancelled = self._cancelled, set()
        for jobs in arrivals:
            for job in jobs:
                self._jobs[job.sequence.number] = job
                if job.deadline is not None:
                    self._timed[job.sequence.number] = job
                self.scheduler.add(job.sequence)
        for job in [job for job in self._jobs.values() if job.request.id in cancelled] if cancelled else []:
            self._end(job, "cancelled")

    def _expire(self) -> None:
        now = time.monotonic()
        for job in [job for job in self._timed.values() if job.deadline is not None and job.deadline <= now]:
            self._end(job, "deadline")

    def _run(self, plan: PassPlan) -> None:
        jobs = [self._jobs[piece.sequence.number] for piece in plan.pieces]
        for job in jobs:
            job.begin()
        sampled = [job for job, piece in zip(jobs, plan.pieces, strict=True) if piece.samples]
        masks, errors = masks_of(sampled)
        try:
            logits = self._logits(plan)
            chosen = choose_rows(self._ops, logits, [job.chooser for job in sampled], masks) if sampled else []
            self.scheduler.ran(plan)
            if self.ran_pass is not None:
                self.ran_pass(sum(piece.stop - piece.start for piece in plan.pieces))
        except BaseException as error:  # of whatever kind: it ends the requests of this pass, not the others
            self.scheduler.restart()
            if not isinstance(error, Exception):  # Ctrl-C: the pass is half done, and its requests are as before
                raise
            if self.lead is not None and self.lead.over:  # nobody knows what other ranks do
                raise
            for job in jobs:
                self._end(job, "error", error)
            return
        for job, one in zip(sampled, chosen, strict=True):
            self._take(job, one, errors.get(job.sequence.number))

    def _logits(self, plan: PassPlan) -> Tensor:
        """The logits (S, vocabulary) after the pieces that end with a new token, in their order; run by all ranks."""
        work = pack(plan, self.padding, self.scheduler.pool.size)
        if self.lead is None:
            logits = self.runner.run(work)
        else:
            with self.lead.running(work, self._opened):
                logits = self.runner.run(work)
        return self.runner.rows(logits, [row for row, piece in enumerate(plan.pieces) if piece.samples])

    def _take(self, job: Job, chosen: Chosen | None, error: Exception | None) -> None:
        """Give a choice its next token, unless there is an error with it; whatever that is, it is the choice's own."""
        reason: Finish | None = None
        if error is None:
            try:
                reason = job.add(chosen)
            except Exception as own:
                error = own
        if error is not None:
            self._end(job, "error", error)
        elif reason is not None:
            self._end(job, reason)
        else:
            self._tell(job.delta())

    def _end(self, job: Job, reason: Finish, error: Exception | None = None) -> None:
        """Finish a choice: its blocks and features are given back."""
        self.scheduler.drop(job.sequence)
        del self._jobs[job.sequence.number]
        self._timed.pop(job.sequence.number, None)
        self._tell(job.finish(reason, error))
        self._left[job.request.id] -= 1
        if not self._left[job.request.id]:
            with self._changed:
                del self._known[job.request.id], self._left[job.request.id]

    def _tell(self, delta: Delta) -> None:
        tell = self._known[delta.id]
        if tell is None:
            self._kept.append(delta)
        else:
            tell(delta)

    # -- answers ------------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer requests; returns the completions in order, with all choices of a request together.

        Runs the engine itself, or waits for its thread. A request that fails has its error in its completion; errors of
        `submit` are raised before any request is answered.
        """
        done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        ids: list[str] = []
        try:
            for request in requests:
                ids.append(self.submit(request, lambda delta: done.put(delta.completion) if delta.completion else None))
            left = sum(request.n for request in requests)
            found = [self._next(done) for _ in range(left)]
        except BaseException:
            for id in ids:
                self.cancel(id)
            if self._thread is None:
                self._receive()
            raise
        place = {id: number for number, id in enumerate(ids)}
        return sorted(found, key=lambda one: (place[one.id], one.choice))

    def _next(self, done: queue.SimpleQueue[Completion]) -> Completion:
        """The next completion; where no thread does it, by running passes. What others are owed is kept."""
        if self._thread is not None:
            return done.get()
        while done.empty():
            self._kept = self.step()
        return done.get()

    async def stream(self, *requests: Request) -> AsyncGenerator[Delta, None]:
        """Yield the deltas of requests as they are generated by the engine's thread, which is started if necessary.

        The last delta of each choice has its completion. Leaving a stream early cancels its requests. A reader that is
        slower than the model gets several tokens at a time; the buffer is never larger than the answers.
        """
        self.start()
        delivery = Delivery()
        ids: list[str] = []
        try:
            for request in requests:
                ids.append(await self._submitted(request, delivery.put))
            async for delta in delivery.read(sum(request.n for request in requests)):
                yield delta
        finally:
            for id in ids:
                self.cancel(id)

    async def _submitted(self, request: Request, tell: Tell) -> str:
        """`submit` beside the loop; who is cancelled meanwhile leaves no request behind."""
        submitting = asyncio.ensure_future(asyncio.to_thread(self.submit, request, tell))
        try:
            return await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(lambda done: None if done.exception() else self.cancel(done.result()))
            raise

    # -- the thread ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread unless it runs; it ends with `close`."""
        with self._changed:
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(target=self._serve, name="duetvl engine", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Cancel all requests, end the thread, and accept no more requests."""
        with self._changed:
            self._stopping = True
            self._cancelled.update(self._known)
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._receive()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._arrivals or self._cancelled or self._jobs)
                if self._stopping:
                    return
            try:
                self._kept = self.step()
            except BaseException as error:
                self._give_up(error)
                raise

    def _give_up(self, error: BaseException) -> None:
        """The engine itself is broken: nobody waits for ever."""
        with self._changed:
            self._stopping = True
        self._receive()
        failed = error if isinstance(error, Exception) else DuetvlError(f"the engine's thread ended: {error!r}")
        for job in list(self._jobs.values()):
            self._end(job, "error", failed)
