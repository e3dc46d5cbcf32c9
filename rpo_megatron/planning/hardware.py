"""GPUs and how they are wired: what data sheets say, and the shares of it that the planner takes to be reachable.

The shares are assumptions, not measurements; `rpo plan` prints those that it used. Bytes, seconds, FLOP/s.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30
LINK_EFFICIENCY = 0.8
"""Share of a link's data sheet bandwidth that large collectives reach (nccl-tests on NVSwitch: 0.75 to 0.85)."""
MARGIN = 0.05
"""Of a GPU's memory: a sum that comes closer to it is not taken to fit. An estimate is not better than that."""
TENSOR_EFFICIENCY = 0.97
"""Of matrix multiplications, for each doubling of tensor parallelism: the shards are narrower."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The SXM module. Peaks are for dense matrices, bandwidths for one direction."""

    memory: float
    """What torch.cuda reports as total_memory, bytes: less than the name says."""
    fp32_flops: float
    """Without TF32, which torch does not use unless asked."""
    bf16_flops: float
    fp8_flops: float | None
    hbm_bandwidth: float
    nvlink_bandwidth: float
    network_bandwidth: float
    """Of the one network adapter that a GPU has to itself in the usual node of eight."""
    pcie_bandwidth: float
    """To the host's memory."""
    efficiency: float
    """Share of the peak that a layer's matrix multiplications reach on one GPU, communication aside."""

    @property
    def usable(self) -> float:
        """Bytes that a plan may fill."""
        return (1 - MARGIN) * self.memory


GPUS: Mapping[str, Gpu] = {
    # NVIDIA A100 data sheet; HDR 200 Gb/s; PCIe 4. Megatron-LM reached 52-57 % (arXiv 2205.05198, table 5).
    "A100": Gpu(
        memory=79.1 * GIB,
        fp32_flops=19.5e12,
        bf16_flops=312e12,
        fp8_flops=None,
        hbm_bandwidth=2.04e12,
        nvlink_bandwidth=300e9,
        network_bandwidth=25e9,
        pcie_bandwidth=32e9,
        efficiency=0.55,
    ),
    # NVIDIA H100 data sheet; NDR 400 Gb/s; PCIe 5. Megatron-LM's README: 41 % (2B) to 48 % (462B) of bf16's peak.
    "H100": Gpu(
        memory=79.1 * GIB,
        fp32_flops=67e12,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        hbm_bandwidth=3.35e12,
        nvlink_bandwidth=450e9,
        network_bandwidth=50e9,
        pcie_bandwidth=64e9,
        efficiency=0.47,
    ),
    # An H100 with more and faster memory.
    "H200": Gpu(
        memory=139.8 * GIB,
        fp32_flops=67e12,
        bf16_flops=989e12,
        fp8_flops=1979e12,
        hbm_bandwidth=4.8e12,
        nvlink_bandwidth=450e9,
        network_bandwidth=50e9,
        pcie_bandwidth=64e9,
        efficiency=0.47,
    ),
    # NVIDIA HGX B200 data sheet, an eighth of the board; NDR 400 Gb/s.
    "B200": Gpu(
        memory=178.3 * GIB,
        fp32_flops=75e12,
        bf16_flops=2250e12,
        fp8_flops=4500e12,
        hbm_bandwidth=7.7e12,
        nvlink_bandwidth=900e9,
        network_bandwidth=50e9,
        pcie_bandwidth=64e9,
        efficiency=0.45,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs of one kind in nodes of one size, numbered node by node."""

    gpu: Gpu
    gpus: int
    per_node: int

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.per_node)

    def collective_bandwidth(self, *, size: int, stride: int) -> float:
        """Bytes per second that each rank of a ring gets through: `size` ranks that are `stride` GPUs apart.

        Inside a node it is NVLink's. Across nodes the ranks that a ring has in one node share all their adapters.
        """
        if size * stride <= self.per_node:
            return self.gpu.nvlink_bandwidth * LINK_EFFICIENCY
        members = max(1, self.per_node // stride)
        return min(self.gpu.nvlink_bandwidth, members * self.gpu.network_bandwidth) * LINK_EFFICIENCY

    def neighbour_bandwidth(self, *, size: int, stride: int) -> float:
        """Between two ranks of a line, where each has its own adapter and the slowest hop counts."""
        inside = size * stride <= self.per_node
        return (self.gpu.nvlink_bandwidth if inside else self.gpu.network_bandwidth) * LINK_EFFICIENCY
