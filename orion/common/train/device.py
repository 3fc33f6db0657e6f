"""Which device computes, and how precisely. Miner and validator follow the same rule, so that results are alike."""

import torch

from orion.common.errors import ConfigError


def device_named(name: str) -> torch.device:
    """`cpu`, `cuda`, `cuda:N`, or `auto` (CUDA where there is one). Raises ConfigError for what this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"no device {name!r}; choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"no device {name!r} here: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def device_text(device: torch.device) -> str:
    """What people call it; an accelerator's own name, from which its peak follows."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on an accelerator, which has units for it; float32 on a CPU, where it would be slower."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
