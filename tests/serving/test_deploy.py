"""The examples of deploy/ are of this server: options, paths, times and metrics that there are."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from duetvl.commands.parser import parse
from duetvl.inference.blocks import BlockPool
from duetvl.inference.scheduler import Limits, Scheduler
from duetvl.inference.vision_cache import VisionCache
from duetvl.serving.app import OPEN_PATHS
from duetvl.serving.metrics import Metrics
from duetvl.serving.server import DRAIN

DEPLOY = Path(__file__).parents[2] / "deploy"
CLOSING = 5  # seconds that connections get to close after the drain


def lines_of(name: str) -> str:
    """A file, with lines that go on put together and comments left out."""
    text = (DEPLOY / name).read_text().replace("\\\n", " ")
    return "".join(line + "\n" for line in text.splitlines() if not line.startswith("#"))


def test_the_unit_of_systemd_starts_the_server_and_lets_it_drain() -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(lines_of("duetvl.service"))
    service = unit["Service"]
    _, *words = shlex.split(service["ExecStart"])
    args = parse(words)
    assert args.command == "serve" and args.api_key_file is not None and args.log_format == "json"
    assert int(service["TimeoutStopSec"]) >= drain_of(args) + CLOSING
    assert service["KillSignal"] == "SIGTERM" and "2" in service["RestartPreventExitStatus"].split()


def test_the_image_starts_the_server_without_a_shell_and_without_rights() -> None:
    steps = dict(line.split(" ", 1) for line in lines_of("Dockerfile").splitlines() if line)
    entry = json.loads(steps["ENTRYPOINT"])
    args = parse([*entry[1:], "/models/a"])
    assert entry[0] == "duetvl" and args.model == "/models/a"
    assert (args.host, str(args.port)) == ("0.0.0.0", steps["EXPOSE"]) and steps["USER"] != "0"
    assert f"127.0.0.1:{args.port}/health" in steps["HEALTHCHECK"]
    assert all((DEPLOY.parent / name).exists() for name in steps["COPY"].split()[:-1])


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    text = (DEPLOY / "kubernetes" / "duetvl.yaml").read_text()
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(text)}


def test_the_pod_is_probed_and_ends_in_step_with_the_drain(manifests: dict[str, Any]) -> None:
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    entry = json.loads(dict(line.split(" ", 1) for line in lines_of("Dockerfile").splitlines() if line)["ENTRYPOINT"])
    args = parse([*entry[1:], *container["args"]])
    assert args.port == container["ports"][0]["containerPort"]
    assert args.api_key_file.is_relative_to(container["volumeMounts"][1]["mountPath"])
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    assert set(paths.values()) <= set(OPEN_PATHS)  # probes have no key
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    readiness = container["readinessProbe"]
    assert before >= readiness["periodSeconds"] * readiness["failureThreshold"]
    assert pod["terminationGracePeriodSeconds"] >= before + drain_of(args) + CLOSING


def drain_of(args: Namespace) -> float:
    return DRAIN if args.drain is None else args.drain


def test_the_service_leads_to_the_pod(manifests: dict[str, Any]) -> None:
    template = manifests["Deployment"]["spec"]["template"]
    service = manifests["Service"]["spec"]
    assert service["selector"].items() <= template["metadata"]["labels"].items()
    assert service["ports"][0]["targetPort"] in [port["name"] for port in template["spec"]["containers"][0]["ports"]]


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are() -> None:
    metrics = Metrics(["base"])
    metrics.show_engine(Scheduler(BlockPool(1, consecutive=False), VisionCache(1), 1, Limits(1, 1, 1)))
    kinds = {family.name: family.type for family in metrics.registry.collect()}
    there = {f"{name}{suffix}" for name, kind in kinds.items() for suffix in SUFFIXES[kind]}
    dashboard = json.loads((DEPLOY / "grafana" / "duetvl.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(asked) > 20
    for query in [*asked, dashboard["templating"]["list"][1]["query"]["query"]]:
        names = set(re.findall(r"\b(?:vllm:|http_|process_)\w+", query))
        assert names and names <= there, (query, names - there)
        assert query.count("(") == query.count(")")
        by = re.findall(r"\bby \((\w+)\)", query)
        assert set(by) <= {"le", "status", "finished_reason", "model_name"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
