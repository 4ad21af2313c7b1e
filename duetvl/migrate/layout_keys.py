"""How many processes a script starts, and how they are divided."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from duetvl.core.errors import ConfigError, did_you_mean
from duetvl.migrate.names import CP_ALGORITHMS
from duetvl.migrate.report import Report, Values
from duetvl.migrate.script import advice, options, setting
from duetvl.migrate.shell.simple import Script, Start
from duetvl.migrate.shell.values import Text
from duetvl.migrate.tables import SCRIPT
from duetvl.training.recipe.text import show


@dataclass(frozen=True)
class Devices:
    """How many processes the script starts."""

    script: Script
    start: Start
    path: str

    def count(self, report: Report) -> int:
        """Raises ConfigError where only running the script would tell."""
        given = {name.replace("-", "_"): values for name, values in options(self.start.launcher)}
        if "__worker_num" in given:
            return self._number("--worker_num", given["__worker_num"])
        if "__nproc_per_node" in given:
            nodes = self._number("--nnodes", given["__nnodes"]) if "__nnodes" in given else 1
            return nodes * self._number("--nproc_per_node", given["__nproc_per_node"])
        known = self.script.value("WORLD_SIZE")
        if not known.missing:
            return self._number("WORLD_SIZE", [known])
        launcher = " ".join(word.text for word in self.start.launcher)
        if PurePosixPath(launcher.partition(" ")[0]).name.rstrip("0123456789.") not in ("", "python"):
            raise ConfigError(
                f"{self.path}: how many processes {show(launcher)} starts is not read; start the program with torchrun "
                f"--nproc_per_node or msrun --worker_num in a copy of the script"
            )
        report.add("added", "number of processes", "1, as the program is started by itself")
        return 1

    def _number(self, name: str, words: list[Text]) -> int:
        text, missing = (words[0].text, words[0].missing) if words else ("", "it has no value")
        if not missing and text.isdigit() and int(text):
            return int(text)
        wrong = missing or f"{show(text)} is no number of processes"
        hint = advice(missing, self.script) or "; write it into a copy of the script"
        raise ConfigError(f"{self.path}: {name}: {wrong}{hint}")


def parallel_section(script: Values, devices: Devices, report: Report) -> dict[str, Any]:
    """The section `parallel`. ConfigError where the processes cannot be divided as the arguments say."""
    names = {"tp": "--tensor-model-parallel-size", "pp": "--pipeline-model-parallel-size",
             "cp": "--context-parallel-size"}  # fmt: skip
    made: dict[str, Any] = {axis: script.whole(argument, 1) for axis, argument in names.items()}
    for axis, argument in names.items():
        if made[axis] < 1:
            raise ConfigError(f"{SCRIPT.title}: {argument} is {made[axis]}, expected 1 or more")
        report.add("used", argument, f"parallel.{axis}: {made[axis]}")
    count, replica = devices.count(report), made["tp"] * made["pp"] * made["cp"]
    if count % replica:
        raise ConfigError(
            f"{devices.path}: {count} process{'es' * (count > 1)} cannot be divided into tp {made['tp']} x "
            f"pp {made['pp']} x cp {made['cp']} = {replica}; {setting(devices.script, 'NPUS_PER_NODE', replica)}"
        )
    report.add("used", "number of processes", f"{count} / {replica}: parallel.dp: {count // replica}")
    made = {"pp": made["pp"], "dp": count // replica, "cp": made["cp"], "tp": made["tp"]}
    made |= _replicas(script, made["pp"], report)
    if script.switch("--sequence-parallel"):
        made["sequence"] = True
        report.add("used", "--sequence-parallel", "parallel.sequence: true")
    return made | _context(script, made["cp"], report)


def _replicas(script: Values, pp: int, report: Report) -> dict[str, Any]:
    """FSDP2 divides the parameters over the replicas."""
    divides = script.switch("--use-torch-fsdp2")
    if divides and pp == 1:
        report.add("used", "--use-torch-fsdp2", "parallel.zero: 3, which needs train.recompute: full")
    elif divides:
        report.add(
            "changed", "--use-torch-fsdp2", f"parallel.zero: 3 would divide the parameters over the replicas, and not "
            f"with parallel.pp {pp}: each replica has all of its stages",
        )  # fmt: skip
    if path := script.text("--fsdp2-config-path"):
        report.add(
            "changed", "--fsdp2-config-path", f"{path} is not read: model.dtype holds for all parts, and a block is "
            f"what is gathered and run again",
        )  # fmt: skip
    return {"zero": 3} if divides and pp == 1 else {}


def _context(script: Values, cp: int, report: Report) -> dict[str, Any]:
    algorithm = script.text("--context-parallel-algo") or "ulysses_cp_algo"
    if algorithm not in CP_ALGORITHMS:
        known = did_you_mean(algorithm, CP_ALGORITHMS)
        report.lacks(SCRIPT.title, f"--context-parallel-algo {algorithm}", known)
        algorithm = "ulysses_cp_algo"
    ours = CP_ALGORITHMS[algorithm]
    if cp == 1:
        report.add("not needed", "--context-parallel-algo", "sequences are not divided")
        return {}
    said = f"{algorithm}: parallel.cp_algorithm: {ours}"
    if "adaptive" in algorithm:
        report.add("changed", "--context-parallel-algo", f"{said} - no pass of the ring is left out")
    else:
        report.add("used", "--context-parallel-algo", said)
    return {"cp_algorithm": ours} | (_exchanging(script, cp, report) if ours == "hybrid" else {})


def _exchanging(script: Values, cp: int, report: Report) -> dict[str, Any]:
    """How many ranks exchange heads with each other; where the script does not say, as many as the heads allow."""
    argument = "--ulysses-degree-in-cp"
    degree = script.whole(argument)
    if degree is None:
        return {}
    if degree < 1 or cp % degree:
        possible = ", ".join(str(number) for number in range(1, cp + 1) if cp % number == 0)
        raise ConfigError(
            f"{SCRIPT.title}: {argument} {degree} does not divide --context-parallel-size {cp}; possible are {possible}"
        )
    report.add("used", argument, f"parallel.ulysses: {degree}")
    return {"ulysses": degree}
