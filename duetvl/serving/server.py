"""The process: uvicorn, what signals mean, and the status it ends with."""

from __future__ import annotations

import logging
import socket
import sys
import time
from types import FrameType
from typing import Final, Literal

import uvicorn

from duetvl.core.errors import ConfigError, shown
from duetvl.serving import logs
from duetvl.serving.answering import Answering
from duetvl.serving.guards import App
from duetvl.version import __version__

DRAIN: Final = 60.0  # seconds that answers may take to end after SIGTERM
ENGINE_ENDED: Final = 1
_GRACE: Final = 5.0  # seconds in which a probe sees that the engine has ended, and connections may close
_BY_SIGNAL: Final = 128
# Seconds after which the engine's thread lets the loop have its turn. The loop asks for one after every write, of which
# there are as many in each pass as there are streams: with Python's 5 ms a hundred of them would take half a second.
_TURN: Final = 0.0005


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 takes a free one. Raises ConfigError where that cannot be had."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port {port}: a port is between 0 and {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        words = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen at --host {shown(host)} --port {port}: {words}; choose another") from None
    bound.setblocking(False)
    return bound


class Server(uvicorn.Server):
    """Serves until a signal comes, then finishes what is under way.

    The first SIGTERM or SIGINT: `/ready` says 503, new requests get 503, those under way are answered for `drain`
    seconds; what is not finished then ends with an error. The second ends them at once. Where the engine has ended,
    the server does a few seconds later. `status` is that of the process: 0 where nothing was cut off, 128 + n where
    signal n did that, 1 where the engine has ended.
    """

    def __init__(
        self,
        app: App,
        answering: Answering,
        *,
        bound: socket.socket,
        drain: float = DRAIN,
        log_form: Literal["json", "text"] = "text",
    ) -> None:
        """bound: where it listens, see `bind`."""
        super().__init__(
            uvicorn.Config(
                app,
                log_config=logs.log_config(log_form),
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=int(_GRACE),
            )
        )
        self.answering, self.drain, self._bound = answering, drain, bound
        self.status = 0
        self._signal = 0
        self._until: float | None = None  # on the clock of time.monotonic: when patience ends

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, port, *_ = self._bound.getsockname()
        return host, port

    def serve_until_stopped(self) -> int:
        """Run; the status to exit with."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(_TURN)
        try:
            self.run(sockets=[self._bound])
        finally:
            sys.setswitchinterval(before)
            self.answering.close()
        logs.event("stopped")
        return self.status if self.started else 1

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Of uvicorn."""
        await super().startup(sockets)
        host, port = self.address
        logs.event("started", host=host, port=port, version=__version__)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of uvicorn: a signal has come."""
        logs.event("signal", signal=sig, under_way=self.answering.admission.under_way)
        if self._until is None:
            self.stop(sig)
        else:
            self._cut_off()

    def stop(self, sig: int = 0) -> None:
        """Take no more requests, and end when those under way are answered."""
        self._signal, self._until = sig, time.monotonic() + self.drain
        self.answering.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Of uvicorn, ten times a second: whether to end."""
        answering = self.answering
        if self._until is None:
            if answering.engine.stopped:
                logs.event("engine_ended", level=logging.CRITICAL)
                self.status, self._until = ENGINE_ENDED, time.monotonic() + _GRACE
        elif time.monotonic() > self._until:
            self._cut_off()
        if answering.aborted:  # some may have been on their way to the engine
            answering.abort()
        if answering.draining and not answering.busy:
            self.should_exit = True
        return await super().on_tick(counter)

    def _cut_off(self) -> None:
        """End what is under way; what does not let itself be ended is left."""
        if self.answering.aborted:
            self.should_exit = self.force_exit = True
        if self.answering.busy:
            self.status = self.status or _BY_SIGNAL + self._signal
        self.answering.abort()
        self._until = time.monotonic() + _GRACE
