"""What is started on this node: the command of torchrun or msrun, and its environment."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import duetvl
from duetvl.core.errors import ConfigError

RANK: Final = Path(__file__).with_name("rank.py")
LAUNCHER: Final = "DUETVL_LAUNCHER"  # the number of the process whose screen is rank 0's
RANKS_RUN: Final = ("train", "infer", "chat", "bench", "eval", "serve")  # the commands that may run over ranks
PLACE: Final = "DUETVL_LAUNCH_PLACE"  # the directory of this start, known to its ranks


@dataclass(frozen=True)
class LaunchPlan:
    """A run as this node takes part in it. `words` are those of the command that every rank runs; `survives` are the
    signals that interrupt it and do not end it."""

    backend: str
    words: tuple[str, ...]
    nproc: int
    nnodes: str = "1"
    node_rank: int = 0
    master: str | None = None
    restarts: int = 0
    survives: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        least, most = self._nodes()
        if self.nproc < 1 or least < 1 or most < least or self.restarts < 0:
            raise ConfigError(
                f"launch: --nproc {self.nproc} --nnodes {self.nnodes} --restarts {self.restarts}: processes and nodes "
                f"are counted from 1, restarts from 0"
            )
        if self.elastic and self.backend != "torch_npu":
            raise ConfigError(f"launch: --nnodes {self.nnodes}: {self.engine} starts a fixed number of nodes")
        if not 0 <= self.node_rank < most:
            raise ConfigError(f"launch: --node-rank {self.node_rank}: the {most} nodes are numbered from 0")
        if most > 1 and self.master is None:
            raise ConfigError("launch: several nodes need --master HOST:PORT, the same on all: a free port of node 0")
        if self.master is not None and not self.master.rpartition(":")[2].isdigit():
            raise ConfigError(f"launch: --master {self.master}: expected HOST:PORT, such as node0:29500")

    def _nodes(self) -> tuple[int, int]:
        least, _, most = self.nnodes.partition(":")
        if not least.isdigit() or not (most or least).isdigit():
            raise ConfigError(f"launch: --nnodes {self.nnodes}: expected a number, or with torchrun MIN:MAX")
        return int(least), int(most or least)

    @property
    def elastic(self) -> bool:
        """Whether the number of nodes may change from one start to the next."""
        return ":" in self.nnodes

    @property
    def processes(self) -> int | None:
        """Ranks of the whole run; None where that is known once the nodes have met."""
        return None if self.elastic else self.nproc * self._nodes()[0]

    @property
    def engine(self) -> str:
        """The framework's own launcher."""
        return "msrun" if self.backend == "mindspore" else "torchrun"

    def check_port(self) -> None:
        """Raise ConfigError where another program has the port of --master that the ranks of this node are to open."""
        if self.master is None or self.elastic or self.node_rank:  # else another node's, or of torchrun's own choice
            return
        port = int(self.master.rpartition(":")[2])
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # that of a run that has just ended is free
            try:
                probe.bind(("", port))
            except (OSError, OverflowError) as error:
                reason = error.strerror if isinstance(error, OSError) else "there are 65535 ports"
                raise ConfigError(
                    f"launch: --master {self.master}: its port cannot be opened on this node, which is number 0: "
                    f"{reason}; give a free one, the same on all nodes"
                ) from None

    def command(self, place: Path) -> list[str]:
        """What starts the ranks of this node, each of which is `rank.py` and finds its command in `place`."""
        return self._msrun(place) if self.engine == "msrun" else self._torchrun(place)

    def _torchrun(self, place: Path) -> list[str]:
        host, _, port = (self.master or "").rpartition(":")
        if self.elastic:
            meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.master}", f"--rdzv-id=duetvl-{port}"]
            meeting += [f"--nnodes={self.nnodes}", f"--max-restarts={self.restarts}"]
        elif self.master is None:
            meeting = ["--standalone"]
        else:
            meeting = [f"--nnodes={self.nnodes}", f"--node-rank={self.node_rank}"]
            meeting += [f"--master-addr={host}", f"--master-port={port}"]
        module = [sys.executable, "-m", "torch.distributed.run"]
        return [*module, *meeting, f"--nproc-per-node={self.nproc}", str(RANK), str(place)]

    def _msrun(self, place: Path) -> list[str]:
        host, _, port = (self.master or f"127.0.0.1:{_free_port()}").rpartition(":")
        assert self.processes is not None, "msrun starts a fixed number"
        counts = [f"--worker_num={self.processes}", f"--local_worker_num={self.nproc}"]
        counts += [f"--node_rank={self.node_rank}"] if self.processes > self.nproc else []
        meeting = [f"--master_addr={host}", f"--master_port={port}", "--join=True", f"--log_dir={place / 'msrun'}"]
        module = [sys.executable, "-m", "mindspore.parallel.cluster.run"]
        return [*module, *counts, *meeting, str(RANK), str(place)]

    def environment(self, place: Path) -> dict[str, str]:
        """Of the ranks; what the user has set stays."""
        threads = max(1, (os.cpu_count() or 1) // self.nproc)
        root = str(Path(duetvl.__file__).parents[1])
        return {
            "OMP_NUM_THREADS": str(threads),  # torchrun would give each process one
            "GLOG_v": "3",  # MindSpore's C++ log: errors only
            "HCCL_CONNECT_TIMEOUT": "1200",  # as MindSpeed-MM's scripts: ranks may load for minutes before they meet
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            "PATH": f"{_python_in(place)}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            LAUNCHER: str(os.getpid()),
            PLACE: str(place),
        }


def _python_in(place: Path) -> Path:
    """A directory with this interpreter as `python`, which msrun starts whatever it is."""
    folder = place / "bin"
    folder.mkdir(exist_ok=True)
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return folder


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def log_directory(base: Path | None) -> Path:
    """A new place for the logs of one launch, below `base`."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{os.getpid()}"
    return ((base or Path("launch-logs")) / name).resolve()


def own_place() -> Path | None:
    """Where a process that `duetvl launch` started finds its logs and leaves its failure; None in any other."""
    place = os.environ.get(PLACE)
    return None if place is None else Path(place)


def survived(command: str) -> tuple[int, ...]:
    """The signals that interrupt a command and do not end it."""
    return (signal.SIGINT,) if command == "chat" else ()


def check_words(words: Sequence[str]) -> None:
    """Raise ConfigError where what follows `--` on the command line is none of the commands that ranks run."""
    if not words or words[0] not in RANKS_RUN:
        found = " ".join(words[:1]) or "nothing"
        raise ConfigError(
            f"launch: after -- comes the command that every rank runs ({', '.join(RANKS_RUN)}), found {found}: duetvl "
            f"launch --nproc 8 -- train RECIPE ..."
        )
