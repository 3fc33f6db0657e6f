"""What a device could do at most, by its name, for utilisation figures. Pure data.

Dense bf16 matrix multiplication with fp32 accumulation, in operations a second, as the vendor's data sheets say. A
device that is not listed has no known peak: then no share of it is shown.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_PEAK_FLOPS_PER_S: Final[Mapping[str, float]] = MappingProxyType(
    {
        "B200": 2250e12,
        "H200": 989.4e12,
        "H100 PCIe": 756e12,
        "H100": 989.4e12,
        "A100": 312e12,
        "L40S": 362e12,
        "A6000": 154.8e12,
        "L4": 121e12,
        "RTX 5090": 209.5e12,
        "RTX 4090": 165.2e12,
        "RTX 3090": 71e12,
    }
)
"""The more exact name first."""


def peak_flops_per_s(device: str) -> float | None:
    """Of a device as its miner names it; None where that says nothing known."""
    words = f" {device} ".replace("-", " ")
    return next((peak for name, peak in _PEAK_FLOPS_PER_S.items() if f" {name} " in words), None)
