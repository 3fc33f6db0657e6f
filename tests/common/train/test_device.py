"""Names of devices."""

import pytest
import torch

from orion.common.errors import ConfigError
from orion.common.train.device import compute_dtype, device_named


def test_known_names() -> None:
    assert device_named("cpu") == torch.device("cpu")
    assert device_named("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["tpu-9", "meta", "cuda:99", ""])
def test_what_is_not_there_is_one_clear_line(name: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        device_named(name)


def test_precision_follows_the_device() -> None:
    assert compute_dtype(torch.device("cpu")) is torch.float32
    assert compute_dtype(torch.device("cuda:1")) is torch.bfloat16
