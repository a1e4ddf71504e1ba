"""Chips: peaks from the vendors' data sheets, and the measured efficiency of programs.

Pipeline: name -> [chips] -> roofline. Host only.

Each entry names the source of its peaks and of its efficiency. No number here was
fitted to a result of the paper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

GIB = 2**30
# Fixed time of a copy between host and device: 5 to 7 microseconds per call of
# cudaMemcpyAsync (DualPath 2026, arXiv 2602.21548, section 5.2). The same value is used
# for TPUs, for which no measurement is published.
HOST_COPY_S = 6e-6


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Measured efficiency of programs on a chip.

    Shares are of the chip's `memory_bytes_per_s` or `flops_per_s`.
    """

    read_share: float  # reading weights, in a matrix product of one token
    matmul_share: float  # FLOP/s of matrix products of 2,048 tokens
    attention_read_share: float  # reading keys and values, with many rows
    attention_matmul_share: float  # FLOP/s of attention, with a prompt of 2,048
    layer_s: float  # small operations and attention of a layer, for one token
    all_reduce_s: float  # an all-reduce of a few bytes
    link_share: float  # of link_bytes_per_s, in a large all-reduce
    source: str


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator, with the peaks of its data sheet."""

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    flops_per_s: float  # dense, bfloat16 with float32 sums
    link_bytes_per_s: float  # to the other chips, in one direction
    host_bytes_per_s: float  # to the host, in one direction
    efficiency: Efficiency
    source: str
    host_copy_s: float = HOST_COPY_S


# The A100 reads keys and values at 1.58 TB/s once they exceed its cache. `layer_s`:
# norms, rotation, activation and two sums for one token (33 us), attention of one row
# (15 us).
_A100 = Efficiency(
    read_share=0.77,
    matmul_share=0.75,
    attention_read_share=0.775,
    attention_matmul_share=0.16,
    layer_s=48e-6,
    all_reduce_s=55e-6,
    link_share=0.63,
    source="vidur's A100-80GB profiles: LLaMA-13B's layer; Llama-2-70B's attention on "
    "2 chips; all-reduce over NVLink in pairs",
)
_H100 = Efficiency(
    read_share=0.81,
    matmul_share=0.73,
    attention_read_share=0.775,
    attention_matmul_share=0.16,
    layer_s=30e-6,
    all_reduce_s=35e-6,
    link_share=0.70,
    source="vidur's H100 profiles: LLaMA-13B's layer, all-reduce; attention at the "
    "A100's shares, as no measurement is available",
)
_RTX_PRO = Efficiency(
    read_share=0.89,
    matmul_share=0.785,
    attention_read_share=0.957,
    attention_matmul_share=0.395,
    layer_s=18.6e-6,
    all_reduce_s=35e-6,
    link_share=0.70,
    source="LLMServingSim's RTX PRO 6000 profile of Llama-3.1-8B under vLLM 0.19; "
    "all-reduce: the H100's shares",
)
_RTX_4090 = Efficiency(
    read_share=0.93,
    matmul_share=1.0,
    attention_read_share=0.94,
    attention_matmul_share=0.62,
    layer_s=17.8e-6,
    all_reduce_s=35e-6,
    link_share=0.70,
    source="LLMServingSim's RTX 4090 profile of Llama-3.1-8B under vLLM 0.19, whose "
    "clock exceeds the data sheet's; all-reduce: the H100's shares",
)
_TPU = Efficiency(
    read_share=0.97,
    matmul_share=0.745,
    attention_read_share=0.25,
    attention_matmul_share=0.062,
    layer_s=9.3e-6,
    all_reduce_s=10e-6,
    link_share=0.70,
    source="LLMServingSim's TPU v6e profile of Llama-3.1-8B, whose attention kernel "
    "is slow; all-reduce: assumed, 10 us and the H100's share",
)

_NVIDIA = "NVIDIA's data sheet of the {}; GB of memory taken as 2**30 bytes"
_GOOGLE = "Google Cloud's documents on the {}; host link: PCIe, taken as 32 GB/s"


def _chip(
    name: str,
    gib: int,
    gb_per_s: float,
    tflops: float,
    *,
    link_gb_per_s: float,
    host_gb_per_s: float,
    efficiency: Efficiency,
    source: str,
) -> Chip:
    """Convert units; bandwidths are in GB/s, in one direction."""
    return Chip(
        name=name,
        memory_bytes=gib * GIB,
        memory_bytes_per_s=gb_per_s * 1e9,
        flops_per_s=tflops * 1e12,
        link_bytes_per_s=link_gb_per_s * 1e9,
        host_bytes_per_s=host_gb_per_s * 1e9,
        efficiency=efficiency,
        source=source,
    )


def _gpu(
    *sizes: Any, link_gb_per_s: float, pcie: int, efficiency: Efficiency, title: str
) -> Chip:
    """Return a GPU of NVIDIA; `pcie` is the generation of its 16 lanes."""
    return _chip(
        *sizes,
        link_gb_per_s=link_gb_per_s,
        host_gb_per_s={4: 32, 5: 64}[pcie],
        efficiency=efficiency,
        source=_NVIDIA.format(title),
    )


def _tpu(name: str, *sizes: Any, link_gb_per_s: float) -> Chip:
    """Return a TPU; `link_gb_per_s` counts both directions and all ports."""
    return _chip(
        name,
        *sizes,
        link_gb_per_s=link_gb_per_s / 2,
        host_gb_per_s=32,
        efficiency=_TPU,
        source=_GOOGLE.format(name),
    )


_ALL = (
    _gpu(
        "a100-40g",
        *(40, 1555, 312),
        link_gb_per_s=300,
        pcie=4,
        efficiency=_A100,
        title="A100 SXM4 40 GB",
    ),
    _gpu(
        "a100-80g",
        *(80, 2039, 312),
        link_gb_per_s=300,
        pcie=4,
        efficiency=_A100,
        title="A100 SXM4 80 GB",
    ),
    _gpu(
        "h100",
        *(80, 3350, 989.4),
        link_gb_per_s=450,
        pcie=5,
        efficiency=_H100,
        title="H100 SXM5",
    ),
    _gpu(
        "h200",
        *(141, 4800, 989.4),
        link_gb_per_s=450,
        pcie=5,
        efficiency=_H100,
        title="H200 SXM",
    ),
    # Without links of its own: chips communicate over PCIe.
    _gpu(
        "l4",
        *(24, 300, 121),
        link_gb_per_s=32,
        pcie=4,
        efficiency=_RTX_4090,
        title="L4",
    ),
    _gpu(
        "rtx-4090",
        *(24, 1008, 165.2),
        link_gb_per_s=32,
        pcie=4,
        efficiency=_RTX_4090,
        title="GeForce RTX 4090 (Ada white paper)",
    ),
    # The server edition, of which the profiles were measured. (The workstation edition
    # reads 1,792 GB/s.)
    _gpu(
        "rtx-pro-6000",
        *(96, 1597, 503.8),
        link_gb_per_s=64,
        pcie=5,
        efficiency=_RTX_PRO,
        title="RTX PRO 6000 Blackwell Server Edition",
    ),
    _tpu("tpu-v5e", 16, 819, 197, link_gb_per_s=400),
    _tpu("tpu-v5p", 95, 2765, 459, link_gb_per_s=1200),
    _tpu("tpu-v6e", 32, 1640, 918, link_gb_per_s=800),
    _tpu("tpu7x", 192, 7380, 2307, link_gb_per_s=1200),
)
CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _ALL}


def find_chip(name: str) -> Chip:
    """Find a chip by its name, in any case, with "_" or "-".

    Raises:
      ValueError: the name is unknown; the message lists the known ones.
    """
    key = name.lower().replace("_", "-")
    if key not in CHIPS:
        raise ValueError(f"gpu: expected one of {', '.join(CHIPS)}, got {name!r}")
    return CHIPS[key]
