"""An engine over many ranks: one of them leads, the others follow.

The leading rank has the engine: requests, scheduler, sampling, clock. The others have their parts of the model and of
the cache; they run each pass that they are told of and decide nothing. What they are told comes by a `HostTransport`
of its own, which may be silent for days: a rank that waits sleeps in the kernel. The tokens that were chosen are part
of the next pass.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from duetvl.core.backend import Backend
from duetvl.core.composed.collectives import time_limit
from duetvl.core.errors import BackendError, ConfigError
from duetvl.core.host_transport import Address, HostTransport
from duetvl.core.ranks import Ranks
from duetvl.inference.passes import Pass
from duetvl.inference.room import Room, pool_blocks
from duetvl.inference.runner import Generator, Runner
from duetvl.inference.scheduler import Limits

Told = Any
Producer = TypeVar("Producer", bound=Generator)


@dataclass(frozen=True)
class Load:
    """Read a model, with what `api.load_model` takes."""

    path: str
    dtype: str
    adapter: str | Path | None
    base: str | None


@dataclass(frozen=True)
class Adapt:
    """Lay adapters beside the model, given by name and directory, in the place of those before."""

    directories: Mapping[str, str]


@dataclass(frozen=True)
class Open:
    """Make the cache of a new engine; that of the one before goes."""

    room: Room
    limits: Limits
    context: int
    spare: int


@dataclass(frozen=True)
class End:
    """There is nothing more to do."""


def connect(backend: Backend) -> HostTransport:
    """The connections by which ranks are told what to run. All ranks call it together, after `Collectives.start`."""
    all_ranks = backend.collectives
    limit = time_limit("DUETVL_PEER_TIMEOUT")
    line = HostTransport(all_ranks.rank, all_ranks.size, all_ranks.meeting_host(), limit, patient=True)
    line.connect([Address.unpack(one) for one in all_ranks.gather_objects(line.address.packed())])
    return line


class Lead:
    """The leading rank's end.

    `lost` is the error with which another rank went, as soon as that is known; `broken` the one with which something
    ended that all ranks do together. After either nothing can be run any more.
    """

    def __init__(self, ranks: Ranks, line: HostTransport, followers: Sequence[int]):
        self.ranks, self.opened = ranks, 0
        self.lost: BackendError | None = None
        self.broken: BaseException | None = None
        self._line, self._followers = line, list(followers)
        self._ended = False

    def tell(self, what: Told) -> None:
        """Have the others do something. Raises BackendError where one of them has gone."""
        if self.over:
            raise self.lost or BackendError(f"the ranks are out of step since an earlier error: {self.broken}")
        try:
            self._line.send_value(what, self._followers)
        except BackendError as error:
            self.broken = error
            raise

    @property
    def over(self) -> bool:
        """Whether nothing can be run any more."""
        return self.lost is not None or self.broken is not None

    @contextmanager
    def telling(self, what: Told) -> Iterator[None]:
        """The same around what this rank does of it. An error that not all ranks raise alike breaks it."""
        self.tell(what)
        try:
            yield
        except BaseException as error:
            if getattr(error, "agreed", False):
                self._ended = True  # the others leave with the same error
            else:
                self.broken = error
            raise

    def open(self, model: Generator, room: Room, limits: Limits, context: int, spare: int) -> int:
        """The blocks of a new engine's pool, as many as the rank with the least room has; see `pool_blocks`.

        The engine before can run nothing more: its caches on the other ranks go.
        """
        self.opened = self.opened + 1
        with self.telling(Open(room, limits, context, spare)):
            return _agreed_blocks(self.ranks, model, room, limits, context, spare)

    @contextmanager
    def running(self, work: Pass, opened: int) -> Iterator[None]:
        """Have the others run a pass of the engine that was opened with this number, while this rank does."""
        if opened != self.opened:
            raise ConfigError("a newer engine runs on these ranks; keep one at a time")
        with self.telling(work):
            yield

    def wait_for_loss(self) -> BackendError | None:
        """Wait until another rank goes, and give the error; None where this rank was the first to end. For a thread of
        its own."""
        rank = self._line.wait_for_end()
        if self._ended:
            return None
        self.lost = BackendError(f"rank {rank} has gone; see its log")
        return self.lost

    def end(self) -> None:
        """Let the others go, if they are there."""
        self._ended = True
        with suppress(BackendError):
            self._line.send_value(End(), self._followers)


@dataclass
class Follower(Generic[Producer]):
    """Another rank's end. load: its part of a model. adapted: the model with the adapter of a directory."""

    ranks: Ranks
    line: HostTransport
    load: Callable[[Load], Producer]
    adapted: Callable[[Producer, str], Producer]
    models: dict[str, Producer] = field(default_factory=dict)
    runner: Runner | None = None

    def follow(self, lead: int) -> None:
        """Do what the leading rank tells, until it ends. Raises BackendError where that goes without a word."""
        while not isinstance(told := self.line.receive_value(lead), End):
            self._do(told)

    def _do(self, told: Told) -> None:
        if isinstance(told, Load):
            self.models = {"": self.load(told)}
        elif isinstance(told, Adapt):
            self.ranks.together(lambda: self._adapt(told.directories))
        elif isinstance(told, Open):
            self.runner = None  # before memory is looked at
            blocks = _agreed_blocks(self.ranks, self.models[""], told.room, told.limits, told.context, told.spare)
            self.runner = Runner(self.models, blocks + told.spare)
        else:
            assert self.runner is not None, "a pass comes after the engine was opened"
            self.runner.run(told)

    def _adapt(self, directories: Mapping[str, str]) -> None:
        plain = self.models[""]
        self.models = {"": plain, **{name: self.adapted(plain, place) for name, place in directories.items()}}


def _agreed_blocks(ranks: Ranks, model: Generator, room: Room, limits: Limits, context: int, spare: int) -> int:
    """The least of all ranks. Those whose device is the processor have equal parts of their host's memory."""
    device = socket.gethostname() if not model.backend.device.product else f"rank {ranks.index}"
    sharing = ranks.each(device).count(device)
    return min(ranks.each(ranks.together(lambda: pool_blocks(model, room, limits, context, spare, sharing))))
