"""One rank, as torchrun or msrun starts it: says who it is, has its output go where it belongs, runs its command.

`python rank.py PLACE`: the words of the command are in PLACE, and there it leaves its process number, the log of any
rank but the first, and, unless it is killed, its exit status; `returned` behind it: the command came to its end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def own_name() -> str:
    """`rank-00003`, from what torchrun or msrun has set; `scheduler` for the process that msrun adds."""
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        return "scheduler"
    number = os.environ.get("RANK") or os.environ.get("MS_NODE_ID") or os.environ.get("RANK_ID") or "0"
    return f"rank-{int(number):05}"


def redirect(name: str, place: Path) -> None:
    """Rank 0 writes to the launcher's own terminal, files or pipes, the others to a log."""
    screens = [Path("/proc", os.environ["DUETVL_LAUNCHER"], "fd", str(number)) for number in (1, 2)]
    log = place / f"{name}.log"
    for number, screen in enumerate(screens, 1):
        target = screen if name == "rank-00000" else log
        try:
            opened = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError:  # no /proc, or a socket
            opened = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(opened, number)
        os.close(opened)
    # Python's streams remember what these were: a terminal shows lines at once, a pipe cannot be sought.
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115


def leave(file: Path, text: str) -> None:
    """A small file that is either whole or not there."""
    draft = file.with_name(f".{file.name}.draft")
    draft.write_text(text)
    draft.rename(file)


def main() -> int:
    """Run the command, and return the exit status that its launcher is to see."""
    place, name = Path(sys.argv[1]), own_name()
    redirect(name, place)
    (place / f"{name}.status").unlink(missing_ok=True)  # of a start before this one, by torchrun
    leave(place / f"{name}.pid", str(os.getpid()))
    from duetvl.cli import main as command

    status, how = 1, ""
    try:
        status = command(json.loads((place / "words.json").read_text()))
        how = " returned"
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    finally:
        leave(place / f"{name}.status", f"{status}{how}")
    return 0 if is_meant(status, returned=bool(how)) else status


def is_meant(status: int, *, returned: bool) -> bool:
    """Whether torchrun or msrun must not see this as a failure, after which they kill the others or start again."""
    elastic = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    return status > 128 or (status == 1 and returned) or (elastic and status == 2)


if __name__ == "__main__":
    del sys.path[0]  # this directory
    sys.exit(main())
