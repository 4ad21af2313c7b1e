"""Pool and scheduler against a cache of plain numbers: whatever happens, a sequence reads its own rows, and nothing
gets lost. No model, no framework."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from duetvl.core.batch import Sample
from duetvl.inference.blocks import BlockPool
from duetvl.inference.request import Request
from duetvl.inference.scheduler import Limits, PassPlan, Scheduler, Sequence
from duetvl.inference.vision_cache import Medium, VisionCache

BLOCK = 4


def medium(first: int, tokens: int, content: int) -> Medium:
    """Four patches a token."""
    digest = hashlib.sha256(repr((tokens, content)).encode()).digest()
    return Medium(first, first + tokens, np.zeros((4 * tokens, 1)), np.array([1, 4, tokens]), digest)


def sequence(number: int, ids: list[int], media: tuple[Medium, ...] = (), new: int = 6, adapter: str = "") -> Sequence:
    request = Request(Sample(np.array(ids)), max_new_tokens=new, adapter=adapter)
    positions = np.broadcast_to(np.arange(len(ids), dtype=np.int32), (3, len(ids)))
    return Sequence(request, number, 0, np.array(ids, np.int32), positions, len(ids), media, BLOCK)


class Cache:
    """What the rows of a cache hold: of each row a digest of all that it depends on; and which features there are."""

    def __init__(self, blocks: int):
        self.rows: list[bytes | None] = [None] * (blocks * BLOCK)
        self.features: set[bytes] = set()

    def run(self, plan: PassPlan) -> None:
        """As the runner does: copies, features, rows."""
        for source, target, count in plan.copies:
            assert abs(source - target) >= count, "a copy overlaps"
            moved = self.rows[source * BLOCK : (source + count) * BLOCK]
            self.rows[target * BLOCK : (target + count) * BLOCK] = moved
        self.features -= set(plan.forget)
        for key, _ in plan.encode:
            assert key not in self.features, "features are computed twice"
            self.features.add(key)
        for piece in plan.pieces:
            one = piece.sequence
            assert piece.start == one.done < piece.stop <= one.length
            places = self.places(one, piece.stop)
            assert [self.rows[place] for place in places[: piece.start]] == expected(one, piece.start)
            for shown in one.within(piece.start, piece.stop):
                assert one.feature_key(shown) in self.features
        written: set[int] = set()
        for piece in plan.pieces:
            places = self.places(piece.sequence, piece.stop)[piece.start :]
            assert written.isdisjoint(places), "two sequences write one row"
            written.update(places)
            for place, row in zip(places, expected(piece.sequence, piece.stop)[piece.start :], strict=True):
                self.rows[place] = row

    def places(self, one: Sequence, rows: int) -> list[int]:
        assert one.held is not None
        return [one.held.blocks[row // BLOCK] * BLOCK + row % BLOCK for row in range(rows)]


def expected(one: Sequence, rows: int) -> list[bytes]:
    """What the first rows of a sequence depend on: all ids and media up to them, adapter and salt."""
    chain, found = hashlib.sha256(repr((one.request.adapter, one.request.salt)).encode()), []
    for row, token in enumerate(one.rows(0, rows).tolist()):
        chain.update(repr((token, [(m.digest, row - m.first) for m in one.within(row, row + 1)])).encode())
        found.append(chain.digest())
    return found


def advance(scheduler: Scheduler, cache: Cache, plan: PassPlan) -> list[Sequence]:
    """Run a plan; every sequence that gets a token gets 7. Those that came to their end, which are dropped."""
    cache.run(plan)
    scheduler.ran(plan)
    ended = []
    for piece in plan.pieces:
        if piece.stop == piece.sequence.length:
            piece.sequence.tokens.append(7)
            if len(piece.sequence.tokens) == piece.sequence.request.max_new_tokens:
                scheduler.drop(piece.sequence)
                ended.append(piece.sequence)
    scheduler.check()
    return ended


class Life(RuleBasedStateMachine):
    """Requests come, run, are cancelled and preempted; passes fail."""

    @initialize(
        blocks=st.integers(6, 14),
        consecutive=st.booleans(),
        rows=st.integers(4, 12),
        sequences=st.integers(1, 4),
        reuse=st.sampled_from([True, True, False]),
    )
    def begin(self, blocks: int, consecutive: bool, rows: int, sequences: int, reuse: bool) -> None:
        self.cache, self.number = Cache(blocks), 0
        pool, limits = BlockPool(blocks, consecutive=consecutive), Limits(rows, sequences, pass_patches=24)
        self.scheduler = Scheduler(pool, VisionCache(10), BLOCK, limits, reuse=reuse)
        self.live: list[Sequence] = []

    @rule(
        beginning=st.sampled_from([0, 0, 1]),
        length=st.sampled_from([1, 3, 4, 5, 8, 9, 12, 15, 16, 17]),
        new=st.integers(1, 12),
        adapter=st.sampled_from(["", "", "", "other"]),
        pictures=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 1)), max_size=2),
    )
    def submit(self, beginning: int, length: int, new: int, adapter: str, pictures: list[tuple[int, int]]) -> None:
        """Prompts of few beginnings, so that many share theirs; pictures behind the second token."""
        ids, media = [beginning] * length, []
        for tokens, content in pictures:
            if len(ids) >= 2:
                first = 2 + sum(one.tokens for one in media)
                media.append(medium(first, tokens, content))
                ids = ids[:first] + [9] * tokens + ids[first:]
        one = sequence(self.number, ids, tuple(media), new, adapter)
        if self.scheduler.fits(one):
            self.scheduler.add(one)
            self.live.append(one)
            self.number += 1

    @rule(times=st.integers(1, 8))
    def run(self, times: int) -> None:
        """Several steps: requests shall come to their ends, so that others find what they leave."""
        for _ in range(times):
            self.step()

    def step(self) -> None:
        plan = self.scheduler.next()
        assert (plan is None) == (not self.live), "sequences wait for ever"
        if plan is not None:
            assert sum(piece.stop - piece.start for piece in plan.pieces) <= self.scheduler.limits.pass_tokens
            assert {piece.sequence.request.adapter for piece in plan.pieces} == {plan.adapter}
            for ended in advance(self.scheduler, self.cache, plan):
                self.live.remove(ended)

    @precondition(lambda self: self.live)
    @rule(which=st.integers(0, 99), really=st.sampled_from([False, False, True]))
    def cancel(self, which: int, really: bool) -> None:
        if not really:
            return
        one = self.live.pop(which % len(self.live))
        self.scheduler.drop(one)

    @precondition(lambda self: self.live)
    @rule(really=st.integers(0, 7))
    def fail(self, really: int) -> None:
        """Nothing of a pass was run, and what the cache holds is unknown; its requests end."""
        if really:
            return
        plan = self.scheduler.next()
        self.cache.rows = [None] * len(self.cache.rows)
        self.cache.features -= set(plan.forget)  # which comes before all that can fail
        self.scheduler.restart()
        for piece in plan.pieces:
            self.scheduler.drop(piece.sequence)
            self.live.remove(piece.sequence)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            assert len(self.scheduler.running) + len(self.scheduler.waiting) == len(self.live)

    def teardown(self) -> None:
        """All that is left comes to its end, in a bounded number of steps."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            plan = self.scheduler.next()
            if plan is None:
                break
            for ended in advance(self.scheduler, self.cache, plan):
                self.live.remove(ended)
        assert not self.live
        assert self.scheduler.pool.used == self.scheduler.vision.held == 0


def test_features_are_kept_from_the_first_chunk_to_the_last() -> None:
    """A medium that is cut into chunks is computed once, held in between, and let go when its last row is done."""
    vision = VisionCache(20)
    scheduler = Scheduler(BlockPool(8, consecutive=False), vision, BLOCK, Limits(3, 1, 100))
    cache, one = Cache(8), sequence(0, [1, 2, *[9] * 7, 3, *[9] * 4, 5], (medium(2, 7, 0), medium(10, 4, 1)), new=1)
    scheduler.add(one)
    seen = []
    while (plan := scheduler.next()) is not None:
        advance(scheduler, cache, plan)
        seen.append((len(plan.encode), vision.held))
    assert seen == [(1, 7), (0, 7), (0, 0), (1, 4), (0, 0)]
    assert vision.cached == 11


def test_several_copies_in_one_pass() -> None:
    """Of rows that a running sequence has, for two that come at once."""
    scheduler = Scheduler(BlockPool(15, consecutive=True), VisionCache(10), BLOCK, Limits(16, 8, 24))
    cache = Cache(15)
    scheduler.add(sequence(0, [1] * 9, new=8))
    advance(scheduler, cache, scheduler.next())
    scheduler.add(sequence(1, [1] * 9, new=8))
    scheduler.add(sequence(2, [1] * 10, new=8))
    plan = scheduler.next()
    assert [(copy.source, copy.blocks) for copy in plan.copies] == [(0, 2), (0, 2)]
    assert [(piece.start, piece.stop) for piece in plan.pieces] == [(9, 10), (8, 9), (8, 10)]
    advance(scheduler, cache, plan)


def test_after_a_failed_pass_nothing_of_the_cache_is_relied_on() -> None:
    """Not what is cached, nor copies that were decided on."""
    scheduler = Scheduler(BlockPool(15, consecutive=True), VisionCache(10), BLOCK, Limits(16, 8, 24))
    cache = Cache(15)
    for number in range(2):
        scheduler.add(sequence(number, [1] * 9, new=8))
        advance(scheduler, cache, scheduler.next())
    scheduler.add(sequence(2, [1] * 9, new=8, adapter="other"))
    lost = scheduler.next()
    cache.rows = [None] * len(cache.rows)
    scheduler.restart()
    for piece in lost.pieces:
        scheduler.drop(piece.sequence)
    scheduler.add(sequence(3, [1] * 9, new=8))
    while (plan := scheduler.next()) is not None:
        advance(scheduler, cache, plan)


def test_a_large_request_is_not_passed_over_for_ever() -> None:
    """Small ones of another adapter come again and again; the large one gets the blocks that they give back."""
    scheduler = Scheduler(BlockPool(8, consecutive=True), VisionCache(10), BLOCK, Limits(16, 8, 24))
    cache = Cache(8)
    for number in range(3):
        scheduler.add(sequence(number, [number] * 6, new=3, adapter="small"))
    assert scheduler.next() is not None  # is never run: they hold their blocks
    large = sequence(3, [9] * 20, new=8)
    scheduler.add(large)
    for number in range(4, 40):
        scheduler.add(sequence(number, [number] * 6, new=3, adapter="small"))
        plan = scheduler.next()
        assert plan is not None
        if any(ended is large for ended in advance(scheduler, cache, plan)):
            return
    raise AssertionError("it still waits")


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
