"""Which rows of which sequences make the next pass, and in which blocks. Decides on integers alone; no tensors.

A step has a budget of rows. Running sequences get their next row first, then come chunks of prompts, then sequences
that waited, if there are blocks for all of their prompt and one row more. Where a running sequence finds no block, the
one that came last gives up its own: its tokens are kept, its rows are computed again when its turn comes.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import numpy as np

from duetvl.inference.blocks import BlockPool, Copy, Held, PrefixKeys
from duetvl.inference.request import Request
from duetvl.inference.vision_cache import Medium, VisionCache


@dataclass(eq=False)
class Sequence:
    """One choice of a request under way. `number` is its place in the order of arrival.

    ids (T,) int32 and positions (3, T) of the prompt; `following` the position of the first new token. `done` rows are
    in the cache, in the blocks `held`; the others, the last token among them, are still to be computed.
    """

    request: Request
    number: int
    choice: int
    ids: np.ndarray
    positions: np.ndarray
    following: int
    media: tuple[Medium, ...]
    block_size: int
    tokens: list[int] = field(default_factory=list)
    done: int = 0
    found: int = 0  # of `done`, those that were in the cache when it last began
    held: Held | None = None
    keys: PrefixKeys = field(init=False)

    def __post_init__(self) -> None:
        root = repr((self.request.adapter, self.request.salt)).encode()
        self.keys = PrefixKeys(root, self.block_size, self._content)

    @property
    def length(self) -> int:
        """Rows of the prompt and of the tokens so far."""
        return len(self.ids) + len(self.tokens)

    @property
    def most(self) -> int:
        """Rows that it may come to have: the last token needs none."""
        return len(self.ids) + self.request.max_new_tokens - 1

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Ids of some rows, int32."""
        prompt = len(self.ids)
        answer = self.tokens[max(start - prompt, 0) : max(stop - prompt, 0)]
        return np.concatenate([self.ids[start:stop], np.array(answer, np.int32)])

    def places(self, start: int, stop: int) -> np.ndarray:
        """Positions (3, rows) of some rows; those of new tokens go on from the prompt's as text does."""
        prompt = len(self.ids)
        new = np.arange(max(start, prompt), max(stop, prompt), dtype=np.int32) + np.int32(self.following - prompt)
        return np.concatenate([self.positions[:, start:stop], np.broadcast_to(new, (3, len(new)))], axis=1)

    def within(self, start: int, stop: int) -> Iterator[Medium]:
        """The media that have rows among these, in their order."""
        return (medium for medium in self.media if medium.first < stop and medium.last > start)

    def feature_key(self, medium: Medium) -> bytes:
        """What the features of one of its media are kept under: an adapter may change the tower."""
        return self.request.adapter.encode() + b"/" + medium.digest

    def _content(self, start: int, stop: int) -> bytes:
        media = [(medium.digest, medium.first - start) for medium in self.within(start, stop)]
        return self.rows(start, stop).tobytes() + repr(media).encode()


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows start:stop of a sequence in a pass."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """Whether the next token is chosen after it."""
        return self.stop == self.sequence.length


@dataclass(frozen=True, eq=False)
class PassPlan:
    """A pass: features that are let go and copies of blocks first, then the media whose features are missing, then the
    pieces, end to end."""

    adapter: str
    forget: Items[bytes]
    copies: Items[Copy]
    encode: Items[tuple[bytes, Medium]]
    pieces: Items[Chunk]


@dataclass(frozen=True)
class Limits:
    """Most rows and sequences of a pass, and patches that the vision tower takes in one (a larger medium: alone)."""

    pass_tokens: int
    max_sequences: int
    pass_patches: int


@dataclass
class _Pass:
    """A plan in the making."""

    adapter: str
    rows: int
    patches: int
    pieces: list[Chunk] = field(default_factory=list)
    encode: list[tuple[bytes, Medium]] = field(default_factory=list)


class Scheduler:
    """Sequences that wait and that run, over a pool of blocks and a cache of features."""

    def __init__(self, pool: BlockPool, vision: VisionCache, block_size: int, limits: Limits, *, reuse: bool = True):
        """`reuse`: whether rows of earlier sequences are looked for."""
        assert limits.max_sequences <= limits.pass_tokens
        self.pool, self.vision, self.block_size, self.limits, self.reuse = pool, vision, block_size, limits, reuse
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # those that came first, first
        self.preemptions = 0
        self._of_adapter: Counter[str] = Counter()  # sequences, waiting or running
        self._copies: list[Copy] = []  # decided on, and not yet in a plan
        self._last_adapter = ""
        self._short: Sequence | None = None  # waits for blocks, and no later one may take them

    def blocks_for(self, rows: int) -> int:
        """Blocks that this number of rows takes."""
        return -(-rows // self.block_size)

    def fits(self, sequence: Sequence) -> bool:
        """Whether it can run to its end, alone in the pool."""
        return self.blocks_for(sequence.most + 1) <= self.pool.size

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for its turn."""
        self.waiting.append(sequence)
        self._of_adapter[sequence.request.adapter] += 1

    def drop(self, sequence: Sequence) -> None:
        """End a sequence, wherever it is; its blocks and features are given back."""
        self._of_adapter[sequence.request.adapter] -= 1
        if sequence is self._short:
            self._short = None
        if sequence.held is None:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._give_back(sequence)

    def next(self) -> PassPlan | None:
        """The next pass, or None where there is nothing to do. Adapters take turns."""
        for adapter in self._turns():
            made = self._fill(_Pass(adapter, self.limits.pass_tokens, self.limits.pass_patches))
            if made.pieces:
                self._last_adapter = adapter
                copies, self._copies = self._copies, []
                return PassPlan(adapter, self.vision.forgotten(), copies, made.encode, made.pieces)
        return None

    def ran(self, plan: PassPlan) -> None:
        """The pass is in the cache: its blocks can be found, and features that no later chunk needs are let go."""
        for key, _ in plan.encode:
            self.vision.computed(key)
        for piece in plan.pieces:
            sequence = piece.sequence
            assert sequence.held is not None
            before, sequence.done = piece.start // self.block_size, piece.stop
            complete = piece.stop // self.block_size
            keys = sequence.keys.first(complete) if self.reuse and complete > before else []
            for index, key in enumerate(keys[before:], before):
                self.pool.keep(sequence.held, index, key)
            for medium in sequence.within(piece.start, piece.stop):
                if medium.last <= piece.stop:
                    self.vision.release(sequence.feature_key(medium), sequence.number)

    def restart(self) -> None:
        """A pass failed, and nobody knows what the cache holds: everything in it is to be computed again."""
        while self.running:
            self._preempt(self.running[-1])
        self._copies.clear()
        self.pool.forget()

    def check(self) -> None:
        """Assert that pool, features and sequences agree."""
        self.pool.check()
        self.vision.check()
        held = {block for sequence in self.running if sequence.held for block in sequence.held.blocks}
        assert len(held) == self.pool.used
        assert [s.number for s in self.running] == sorted(s.number for s in self.running)

    # -- a pass -------------------------------------------------------------------------------------------------------

    def _turns(self) -> list[str]:
        """Adapters with something to do, the one after the last one's first."""
        names = sorted(name for name, count in self._of_adapter.items() if count)
        later = [name for name in names if name > self._last_adapter]
        return later + [name for name in names if name <= self._last_adapter]

    def _fill(self, made: _Pass) -> _Pass:
        before = self.preemptions
        mine = [s for s in self.running if s.request.adapter == made.adapter]
        for sequence in sorted(mine, key=lambda s: s.length - s.done > 1):  # single rows first, else in order
            if sequence.held is not None and self._has_room(sequence):
                self._add_piece(made, sequence)
        if self.preemptions == before:
            self._admit(made)
        return made

    def _add_piece(self, made: _Pass, sequence: Sequence) -> None:
        """As many of a sequence's missing rows as the budgets allow, maybe none."""
        start, stop = sequence.done, min(sequence.length, sequence.done + made.rows)
        for medium in sequence.within(start, stop):
            if not self._has_features(made, sequence, medium):
                stop = max(start, medium.first)
                break
        if stop > start:
            made.pieces.append(Chunk(sequence, start, stop))
            made.rows -= stop - start

    def _has_features(self, made: _Pass, sequence: Sequence, medium: Medium) -> bool:
        """Hold a medium's features for a sequence; where there are none yet, have them computed in this pass."""
        key, patches = sequence.feature_key(medium), len(medium.patches)
        known = key in self.vision
        if not known and made.encode and patches > made.patches:
            return False
        if not self.vision.hold(key, medium.tokens, sequence.number):
            return False
        if not known:
            made.patches -= patches
            made.encode.append((key, medium))
        return True

    # -- blocks -------------------------------------------------------------------------------------------------------

    def _has_room(self, sequence: Sequence) -> bool:
        """Blocks for all rows of a running sequence; False where it was the last one and gave up its own."""
        assert sequence.held is not None
        while len(sequence.held.blocks) < self.blocks_for(sequence.length):
            copies = self.pool.grow(sequence.held)
            if copies is not None:
                self._copies += copies
                continue
            newest = self.running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._give_back(sequence)
        self.waiting.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        assert sequence.held is not None
        self.pool.release(sequence.held)
        sequence.held, sequence.done = None, 0
        for medium in sequence.media:
            self.vision.release(sequence.feature_key(medium), sequence.number)

    def _admit(self, made: _Pass) -> None:
        """Let waiting sequences of the pass's adapter run, in order, as far as there are rows and blocks."""
        coming = self._coming()
        while made.rows and len(self.running) < self.limits.max_sequences:
            sequence = next((s for s in self.waiting if s.request.adapter == made.adapter), None)
            if sequence is None or (self._short is not None and sequence.number > self._short.number):
                return
            keys = sequence.keys.first((sequence.length - 1) // self.block_size) if self.reuse else []
            found = self.pool.find(keys)
            if coming and not coming.isdisjoint(keys[len(found) : len(found) + 1]):
                return  # what it needs is being computed for another: once it is there, it need not be computed again
            if not self._hold(sequence, found):
                self._short = sequence
                return
            coming.update(keys[len(found) :])
            self._add_piece(made, sequence)

    def _coming(self) -> set[bytes]:
        """Keys of the complete blocks of prompts that running sequences have still to compute."""
        if not self.reuse or not self.waiting:
            return set()
        return {
            key
            for s in self.running
            if s.length - s.done > 1
            for key in s.keys.first((s.length - 1) // self.block_size)[s.done // self.block_size :]
        }

    def _hold(self, sequence: Sequence, found: Items[int]) -> bool:
        needed = self.blocks_for(min(sequence.length + 1, sequence.most + 1))
        got = self.pool.hold(found, needed, self.blocks_for(sequence.most + 1))
        if got is None:
            return False
        sequence.held, copies = got
        self._copies += copies
        sequence.done = sequence.found = len(found) * self.block_size
        if sequence is self._short:
            self._short = None
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda s: s.number)
        return True
