"""The process: uvicorn, what signals mean, and the status it ends with."""

from __future__ import annotations

import logging
import time
from types import FrameType
from typing import Final, Literal

import uvicorn

from duetvl.serving import logs
from duetvl.serving.answering import Answering
from duetvl.serving.guards import App

DRAIN: Final = 60.0  # seconds that answers may take to end after SIGTERM
ENGINE_ENDED: Final = 1
_GRACE: Final = 5.0  # seconds in which a probe sees that the engine has ended, and connections may close
_BY_SIGNAL: Final = 128


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
        host: str,
        port: int,
        drain: float = DRAIN,
        log_form: Literal["json", "text"] = "text",
    ) -> None:
        """port 0 takes a free one; `address` says which."""
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_config=logs.log_config(log_form),
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=int(_GRACE),
            )
        )
        self.answering, self.drain = answering, drain
        self.status = 0
        self._signal = 0
        self._until: float | None = None  # on the clock of time.monotonic: when patience ends

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, once it has started."""
        host, port, *_ = self.servers[0].sockets[0].getsockname()
        return host, port

    def serve_until_stopped(self) -> int:
        """Run; the status to exit with."""
        try:
            self.run()
        finally:
            self.answering.close()
        logs.event("stopped")
        return self.status if self.started else 1

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
