"""Commands that answer, over many ranks: these are started, rank 0 runs the command, the others follow its engine."""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Final

from duetvl.api import Model, load_model
from duetvl.commands.mindspeed import apply, apply_evaluation
from duetvl.commands.processes import end_with_parent
from duetvl.convert.opening import open_model
from duetvl.core.backend import AUTO, Backend, choose_backend, load_backend
from duetvl.core.errors import ConfigError
from duetvl.core.mesh import Mesh
from duetvl.core.ranks import Ranks
from duetvl.inference.lead import Adapt, Follower, Lead, Load, connect
from duetvl.launch.plan import LaunchPlan, log_directory, own_place, survived
from duetvl.launch.run import USER_ERROR, launch
from duetvl.models.qwen_vl.config import ModelConfig
from duetvl.parallel.division import Division
from duetvl.training.failures import ending_alone

FOLLOWED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # by rank 0 alone
_ENDING: Final = threading.Lock()  # whichever thread notices first has the word; it ends the process
_NOTHING_TO_SEE: Final = (0, USER_ERROR, 128 + signal.SIGINT, 128 + signal.SIGTERM)


@dataclass(frozen=True)
class Team:
    """The ranks of this command, as rank 0 sees them."""

    backend: Backend
    mesh: Mesh
    lead: Lead

    def load(self, told: Load) -> Model:
        """Have every rank read its part of a model; this one's."""
        with self.lead.telling(told):
            return part_of(told, self.backend, self.mesh)

    def adapt(self, adapters: dict[str, Model]) -> None:
        """Have the others lay on their parts what `Model.with_adapter` laid on this one's."""
        with self.lead.telling(Adapt({name: str(model.adapter_directory) for name, model in adapters.items()})):
            self.lead.ranks.together(lambda: None)


def backend_name(args: argparse.Namespace) -> str:
    """The backend that is asked for."""
    return args.backend or os.environ.get("DUETVL_BACKEND") or AUTO


def over_ranks(args: argparse.Namespace, run: Callable[[], int]) -> int:
    """Run a command: over the ranks that it asks for, or as one of them. Its exit status.

    On rank 0 `args.team` is then there for `session.load`; the other ranks do not run the command. `args.copies` says
    how many models the processes of `--nproc` hold; where that is several, the command starts the rest itself.
    """
    if getattr(args, "from_mindspeed", None) is not None:
        taken = apply_evaluation if args.command == "eval" else apply
        list(taken(args))  # it may name the model and the device; the command itself reports it
    place = own_place()
    mesh = mesh_of(args) if place is None or args.process is not None else None
    args.copies = 1 if mesh is None or args.divides else (args.nproc or 1) // mesh.size
    if place is not None:
        return _take_part(args, run, place)
    assert mesh is not None, "left out for ranks alone"
    if mesh.size == 1:
        return run()
    _check_model(args, mesh)
    if args.process is not None:
        end_with_parent()
    return _start(args, mesh) if args.copies == 1 or args.process is not None else run()


def mesh_of(args: argparse.Namespace, count: int | None = None) -> Mesh:
    """The ranks among which `--tp` and `--pp` divide a model; `count`: how many there are. ConfigError.

    `--nproc` says how many these are, of a command that has copies of the model how many they all have together.
    """
    given = " ".join(f"--{n} {value}" for n in ("nproc", "tp", "pp") if (value := getattr(args, n)) is not None)
    if any(value is not None and value < 1 for value in (args.nproc, args.tp, args.pp)):
        raise ConfigError(f"{given}: ranks are counted from 1")
    if count is None and not args.divides:
        size = (args.tp or 1) * (args.pp or 1)
        if args.nproc is not None and args.nproc % size:
            possible = f"{args.nproc // size * size} or " if args.nproc > size else ""
            raise ConfigError(
                f"{given}: each copy of the model takes tp x pp = {size} processes; --nproc {possible}"
                f"{(args.nproc // size + 1) * size} has no rest"
            )
        return Mesh(pp=args.pp or 1, tp=args.tp or 1)
    count = args.nproc if count is None else count
    pp = args.pp or (1 if args.tp is None or count is None else max(count // args.tp, 1))
    tp = args.tp or (1 if count is None else max(count // pp, 1))
    if count is not None and tp * pp != count:
        possible = ", ".join(f"--tp {count // n} --pp {n}" for n in range(1, count + 1) if count % n == 0)
        raise ConfigError(f"{given}: tp x pp is the number of ranks, which is {count}; possible are {possible}")
    return Mesh(pp=pp, tp=tp)


def check_degrees(mesh: Mesh, config: ModelConfig) -> None:
    """Raise ConfigError for degrees that a model cannot have; it names those that it can."""
    layers = config.text.num_layers
    if mesh.pp > layers:
        raise ConfigError(
            f"--pp {mesh.pp}: the language model has {layers} layers, of which each stage needs one at least; possible "
            f"are 1 to {layers}"
        )
    try:
        Division.of(config, mesh, 0)
    except ConfigError as error:
        raise ConfigError(str(error).replace("parallel.tp", "--tp")) from None


def _check_model(args: argparse.Namespace, mesh: Mesh) -> None:
    """Raise ConfigError, before anything is started, where there is no model that can be divided so."""
    if getattr(args, "server", None) is not None:
        raise ConfigError("--tp and --pp divide a model among processes here; with --server there is none")
    if args.model is not None:
        check_degrees(mesh, open_model(args.model, base=args.base, weights=False).config)


def _start(args: argparse.Namespace, mesh: Mesh) -> int:
    """Start the ranks on this machine, with the words of this command."""
    backend = choose_backend(backend_name(args), args.device or "auto")
    logs = log_directory(args.log_dir) if args.log_dir else Path(tempfile.mkdtemp(prefix="duetvl-ranks-"))
    words = (*args.argv, "--backend", backend)
    status = launch(LaunchPlan(backend, words, mesh.size, survives=survived(args.command)), logs, logs)
    if not args.log_dir and status in _NOTHING_TO_SEE:
        rmtree(logs, ignore_errors=True)
    return status


def _take_part(args: argparse.Namespace, run: Callable[[], int], place: Path) -> int:
    backend = load_backend(backend_name(args), device=args.device or "auto")
    backend.collectives.start()
    ranks = Ranks(backend.collectives)
    mesh = mesh_of(args, ranks.count)
    args.nproc = None  # they are there
    if ranks.count == 1:
        return run()
    line = connect(backend)
    if ranks.index == 0:
        args.team = Team(backend, mesh, Lead(ranks, line, range(1, ranks.count)))
        return _lead(args.team.lead, run, place)
    for number in FOLLOWED:
        signal.signal(number, signal.SIG_IGN)
    with ending_alone(ranks, place):
        Follower(ranks, line, lambda told: part_of(told, backend, mesh), Model.with_adapter).follow(0)
    return 0


def part_of(told: Load, backend: Backend, mesh: Mesh) -> Model:
    """What this rank has of a model."""
    return load_model(told.path, backend=backend, dtype=told.dtype, adapter=told.adapter, base=told.base, mesh=mesh)


def _lead(lead: Lead, run: Callable[[], int], place: Path) -> int:
    threading.Thread(target=_watch, args=(lead, place), name="duetvl ranks", daemon=True).start()
    try:
        return run()
    except BaseException:
        if not lead.over:
            raise
        with _ENDING, ending_alone(lead.ranks, place):
            raise
    finally:
        lead.end()


def _watch(lead: Lead, place: Path) -> None:
    """End this process soon after another rank has gone, whatever it is waiting for."""
    error = lead.wait_for_loss()
    if error is not None:
        with _ENDING, ending_alone(lead.ranks, place):
            raise error
