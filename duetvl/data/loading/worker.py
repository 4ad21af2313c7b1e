"""What runs in a worker process: it is given an object, and calls its methods as it is asked to.

The process is a fresh interpreter: nothing is forked, as frameworks have threads, and the user's script is not
imported again. It ends when its parent does, however that ends, as the socket is closed then.
"""

from __future__ import annotations

import os
import signal
import socket
import warnings

from duetvl.data.loading.transfer import receive, send

# Started as `python -c START`: the parent's sys.path comes first, so that whatever it can import is found.
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from duetvl.data.loading.worker import main; main(int(sys.argv[2]))"
)


def main(descriptor: int) -> None:
    """Serve until the other end is closed."""
    # The terminal, or a launcher, signals the whole group; it is for the parent to finish its step and save.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # as in the main process
    os.dup2(2, 1)  # whatever is printed here is no output of the command
    with socket.socket(fileno=descriptor) as connection:
        try:
            _serve(connection)
        except (EOFError, BrokenPipeError):
            return


def _serve(connection: socket.socket) -> None:
    try:
        target = receive(connection)
    except (ImportError, AttributeError) as error:
        send(connection, f"{type(error).__name__}: {error}")
        return
    send(connection, None)
    while True:
        method, arguments = receive(connection)
        send(connection, getattr(target, method)(*arguments))
