"""Which links the ranks of a team talk over, and how long that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from duetvl.cost_model.devices import DeviceType


@dataclass(frozen=True)
class Team:
    """Ranks that hold a collective together: how many, on how many nodes, and on the fullest of them."""

    size: int
    nodes: int
    together: int

    @classmethod
    def of(cls, ranks: Sequence[int], node: int) -> Team:
        """Of these ranks, where each node has `node` of them, in order."""
        counts = Counter(rank // node for rank in ranks)
        return cls(len(ranks), len(counts), max(counts.values()))


def collective(device: DeviceType, team: Team, sent: float, rounds: float) -> float:
    """Seconds of collectives in which each rank sends `sent` bytes, and of which each rank waits for `rounds` others.

    A ring through all ranks goes over each node's border once; ranks of a node share what goes there among their ports.
    """
    if team.size == 1:
        return 0.0
    inside = device.inside.reaching(team.together - 1) * device.shares.links
    seconds = sent / inside if team.together > 1 else 0.0
    latency = device.inside.latency
    if team.nodes > 1:
        ports = team.size / team.nodes
        seconds = max(seconds, sent / (ports * device.between.bandwidth * device.shares.links))
        latency = max(latency, device.between.latency)
    return seconds + rounds * latency


def message(device: DeviceType, sender: int, receiver: int, sent: float) -> float:
    """Seconds of one message of `sent` bytes between two ranks."""
    if sender // device.node == receiver // device.node:
        return sent / (device.inside.reaching(1) * device.shares.links) + device.inside.latency
    return sent / (device.between.bandwidth * device.shares.links) + device.between.latency
