"""A miner that cheats: it sends noise instead of what its stage computes, and logs that as its output.

Run as a process of its own, only by tests: `python noisy_miner.py CONFIG_JSON WALLET_PATH WALLET HOTKEY`.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

import torch

from orion.common.protocol.signing import load_hotkey
from orion.common.train.engine import BackwardResult, ForwardResult, StageEngine
from orion.miner import worker
from orion.miner.config import MinerConfig
from orion.miner.service import serve


class NoisyEngine(StageEngine):
    """Computes as everybody else, but what leaves the device is noise of the same size."""

    def forward(self, *arguments: Any) -> ForwardResult:
        result = super().forward(*arguments)
        output, gradient = _noise_like(result.output_BTC), _noise_like(result.input_grad_BTC)
        return ForwardResult(output, result.loss, gradient, result.version)

    def backward(self, *arguments: Any) -> BackwardResult:
        result = super().backward(*arguments)
        return BackwardResult(_noise_like(result.input_grad_BTC), result.version, result.staleness)


def _noise_like(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else torch.randn_like(tensor) * tensor.std()


if __name__ == "__main__":
    config_json, wallet_path, wallet, hotkey = sys.argv[1:]
    worker.StageEngine = NoisyEngine  # type: ignore[misc]
    asyncio.run(serve(MinerConfig.model_validate_json(config_json), load_hotkey(Path(wallet_path), wallet, hotkey)))
