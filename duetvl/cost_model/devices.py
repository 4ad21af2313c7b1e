"""Kinds of devices in numbers: memory, arithmetic, bandwidths and latencies, each with where it is from.

Where a source gives a bandwidth in both directions together, half of it is here. A data sheet's GB are 10^9 bytes, so
that what driver and collectives take of the rest is left to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Final

from duetvl.core.errors import ConfigError

_A100: Final = "NVIDIA A100 80GB data sheet (2021)"
_H100: Final = "NVIDIA H100 data sheet (2022), SXM5; figures with sparsity halved"
_H200: Final = "NVIDIA H200 data sheet (2023), SXM; figures with sparsity halved"
_TITAN: Final = "https://github.com/hicann/torchtitan-npu, table of peaks: the cube units' part, dense"
_ATLAS: Final = "https://www.hiascend.com/hardware/accelerator-card: 64 GB of HBM at 1.6 TB/s"
_MESH: Final = "https://www.meemx.com/p/hccl-contest-log-overall: 56 GB/s both ways on each of 7 HCCS links"
_MATRIX: Final = "arXiv:2506.12708 (CloudMatrix384), of one of the two dies of an Ascend 910C"
_DUO: Final = "https://support.huawei.com/enterprise/en/doc/EDOC1100285916, of one of the card's two processors"
_NCCL: Final = "NCCL, src/graph/tuning.cc: what a step of a ring of the protocol Simple takes"
_LIKE_NCCL: Final = f"assumed to be as on NVIDIA's devices ({_NCCL})"
_PCIE: Final = "PCI Express: a lane of generation 4 carries 2 GB/s each way, of generation 5 the double, of 16 lanes"
_ROCE: Final = "arXiv:2501.14417 (DeepServe): servers of 8 Ascend 910B, RoCE of 200 Gbit/s, taken to be a device's"

Peaks = Mapping[str, float]


@dataclass(frozen=True)
class Link:
    """What a device can send: bytes a second in one direction, and seconds that each step of a collective takes.

    to_one: the most of it that goes to one other device, where each pair has a cable of its own; 0: all of it.
    """

    bandwidth: float
    latency: float
    to_one: float = 0.0

    def reaching(self, others: int) -> float:
        """Bytes a second to this many other devices together."""
        return min(self.bandwidth, self.to_one * others) if self.to_one else self.bandwidth


@dataclass(frozen=True)
class Shares:
    """What a program reaches of what a device could do: assumptions, unless they were measured (docs/planning.md)."""

    products: float = 0.5
    memory: float = 0.8
    links: float = 0.8


@dataclass(frozen=True)
class DeviceType:
    """A kind of device.

    memory: bytes. peaks: operations a second of matrix products by dtype. bandwidth: bytes a second of its memory,
    reading and writing together. node: how many devices the link `inside` joins; `between` joins such nodes. host:
    bytes a second to the host's memory, one way. sources: field -> where its value is from.
    """

    name: str
    memory: int
    peaks: Peaks
    bandwidth: float
    node: int
    inside: Link
    between: Link
    host: float
    sources: Mapping[str, str] = field(compare=False)
    shares: Shares = Shares()

    def operations(self, dtype: str) -> float:
        """Operations a second that a program reaches in products of a dtype.

        Raises ConfigError where that is not known.
        """
        if dtype not in self.peaks:
            raise ConfigError(
                f"device {self.name}: how fast it is in matrix products of {dtype} is not in the table, which has "
                f"{', '.join(sorted(self.peaks))}; choose another model.dtype"
            )
        return self.peaks[dtype] * self.shares.products

    def with_memory(self, memory: int) -> DeviceType:
        """The same with other bytes of memory."""
        return replace(self, memory=memory)


def _halves(operations: float, **others: float) -> Peaks:
    return {"bfloat16": operations, "float16": operations, **others}


def _nvidia(name: str, sheet: str, memory: int, peaks: Peaks, bandwidth: float, links: tuple[float, ...]) -> DeviceType:
    """`links`: GB/s inside a node and between nodes, and to the host."""
    inside, between, host = (1e9 * one for one in links)
    sources = {
        **dict.fromkeys(("memory", "peaks", "bandwidth", "inside"), sheet),
        "node": f"NVIDIA DGX {name}",
        "between": f"NVIDIA DGX {name}: a port of {between * 8 / 1e9:.0f} Gbit/s a device",
        "host": _PCIE,
        "latency": _NCCL,
    }
    return DeviceType(
        name, memory * 10**9, peaks, bandwidth, 8, Link(inside, 3.4e-6), Link(between, 9.6e-6), host, sources
    )


def _ascend_a2(name: str, operations: float, memory: int, bandwidth: float, remark: str = "") -> DeviceType:
    """A variant of the Ascend 910B in a server of eight, such as Atlas 800T A2."""
    sources = {
        "memory": _ATLAS + remark,
        "peaks": _TITAN,
        "bandwidth": _ATLAS + remark,
        "node": _MESH,
        "inside": _MESH,
        "between": _ROCE,
        "host": _PCIE,
        "latency": _LIKE_NCCL,
    }
    inside, between = Link(196e9, 3.4e-6, to_one=28e9), Link(25e9, 9.6e-6)
    return DeviceType(name, memory * 10**9, _halves(operations), bandwidth, 8, inside, between, 32e9, sources)


def _ascend_a3(name: str, node: int, where: str) -> DeviceType:
    """A die of an Ascend 910C, which is a device of its own."""
    sources = {
        **dict.fromkeys(("memory", "bandwidth", "inside", "between"), _MATRIX),
        "peaks": _TITAN,
        "node": f"{_MATRIX}; {where}",
        "host": _PCIE,
        "latency": _LIKE_NCCL,
    }
    inside, between = Link(196e9, 3.4e-6), Link(25e9, 9.6e-6)
    return DeviceType(name, 64 * 10**9, _halves(353.8944e12), 1.6e12, node, inside, between, 32e9, sources)


def _duo() -> DeviceType:
    sources = {
        **dict.fromkeys(("memory", "peaks", "bandwidth"), _DUO),
        "node": "assumed: four cards in a server",
        "inside": f"{_PCIE}, shared by both processors",
        "between": "assumed: as inside, through the host and its network of 100 Gbit/s",
        "host": f"{_PCIE}, shared by both processors",
        "latency": _LIKE_NCCL + ", over PCI Express",
    }
    inside, between = Link(16e9, 5.7e-6), Link(12.5e9, 9.6e-6)
    return DeviceType("300I DUO", 48 * 10**9, {"float16": 70e12}, 204e9, 8, inside, between, 16e9, sources)


_DEVICES: Final = {
    device.name: device
    for device in (
        _ascend_a2("910B1", 373.88e12, 64, 1.6e12),
        _ascend_a2("910B2", 353.8944e12, 64, 1.6e12),
        _ascend_a2("910B3", 294.912e12, 64, 1.6e12),
        _ascend_a2("910B4", 245.76e12, 32, 0.8e12, "; the card of 32 GB is assumed to have half of it"),
        _ascend_a3("A3", 16, "a server has 8 of them, 16 dies"),
        _ascend_a3("A3 SuperPoD", 768, "a SuperPoD has 384 of them"),
        _duo(),
        _nvidia("A100", _A100, 80, _halves(312e12, float32=19.5e12), 2.039e12, (300, 25, 32)),
        _nvidia("H100", _H100, 80, _halves(989.4e12, float32=66.9e12), 3.35e12, (450, 50, 64)),
        _nvidia("H200", _H200, 141, _halves(989.4e12, float32=66.9e12), 4.8e12, (450, 50, 64)),
    )
}
_OTHER_NAMES: Final = {  # of products, by the device that is in them
    "ATLAS 800T A2": "910B3",  # it is sold with several variants, this is the slower one of those with 64 GB
    "910B": "910B3",
    "ATLAS 800T A3": "A3",
    "ATLAS 900 A3": "A3 SuperPoD",
    "910C": "A3",
    "ATLAS 300I DUO": "300I DUO",
    "310P": "300I DUO",
}
DEFAULT: Final = "910B3"

# Peaks of devices that no plan is made for, 1e12 operations a second of dense products; looked for behind those above.
# NVIDIA: the data sheets of L40S (2023), A10 and A30 (2021), V100 (2017), H100 and A100 PCIe, and the Ada whitepaper
# for the 4090 (float32 accumulation); figures "with sparsity" are halved. H800 and A800 differ from H100 and A100 in
# their links alone. float32 is without TF32. Ascend 910 (A): Huawei, Hot Chips 31.
_PEAKS: Final[tuple[tuple[str, dict[str, float]], ...]] = (
    ("H800 PCIE", {"bfloat16": 756.0, "float16": 756.0, "float32": 51.2}),
    ("H800", {"bfloat16": 989.4, "float16": 989.4, "float32": 66.9}),
    ("H100 PCIE", {"bfloat16": 756.0, "float16": 756.0, "float32": 51.2}),
    ("A100", {"bfloat16": 312.0, "float16": 312.0, "float32": 19.5}),
    ("A800", {"bfloat16": 312.0, "float16": 312.0, "float32": 19.5}),
    ("L40S", {"bfloat16": 362.05, "float16": 362.05, "float32": 91.6}),
    ("RTX 4090", {"bfloat16": 165.2, "float16": 165.2, "float32": 82.6}),
    ("A10", {"bfloat16": 125.0, "float16": 125.0, "float32": 31.2}),
    ("A30", {"bfloat16": 165.0, "float16": 165.0, "float32": 10.3}),
    ("V100", {"float16": 125.0, "float32": 15.7}),
    ("910A", {"float16": 256.0}),
)


def device_names() -> list[str]:
    """Of all kinds in the table."""
    return list(_DEVICES)


def device_type(name: str) -> DeviceType:
    """The kind of this name, or of this product.

    Raises ConfigError for an unknown one, with those that are known.
    """
    wanted = " ".join(name.upper().replace("-", " ").split()).removeprefix("ASCEND").strip()
    known = {one.upper(): one for one in _DEVICES} | _OTHER_NAMES
    if wanted in known:
        return _DEVICES[known[wanted]]
    near = get_close_matches(wanted, known, 1)
    hint = f"did you mean {known[near[0]]}? " if near else ""
    raise ConfigError(f"device type {name!r} is not in the table; {hint}known are {', '.join(_DEVICES)}")


def device_of(product: str) -> DeviceType | None:
    """The kind of a device by what its driver calls it, `NVIDIA H200` or `Ascend910B2`; None for one without a row."""
    words = _words(product)
    pci = "PCIE" in words  # its links and clocks are others
    for name, device in _DEVICES.items():
        if not pci and set(name.split()) <= words:
            return device
    return _DEVICES["A3"] if any(word.startswith("910_93") for word in words) else None


def peak_flops(product: str, dtype: str) -> float | None:
    """Operations a second that a device of this name can do in products of this dtype; None where it is not known."""
    if (device := device_of(product)) is not None:
        return device.peaks.get(dtype)
    words = _words(product)
    for part, peaks in _PEAKS:
        if set(part.split()) <= words:
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


def _words(product: str) -> set[str]:
    return set(product.upper().replace("-", " ").replace("ASCEND", " ").split())
