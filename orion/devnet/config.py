"""The development chain's knobs. Owns their defaults and bounds; every part gets the one frozen object."""

from dataclasses import dataclass

from orion.common.errors import ConfigError

RAO = 1_000_000_000
"""Smallest units in one TAO or one alpha."""


@dataclass(frozen=True)
class DevnetConfig:
    """What a development chain is made with. A chain that is kept in a file keeps its `block_ms`, see `persistence`."""

    block_ms: int = 1000
    """Time from block to block, milliseconds."""
    history_blocks: int = 4096
    """Blocks before the newest whose state, body and hash can be asked for. Also bounds a mortal extrinsic's life."""
    pool_size: int = 4096
    """Extrinsics that wait for a block at most."""
    block_size: int = 1024
    """Extrinsics in one block at most."""
    endowment_rao: int = 1_000_000 * RAO
    """What each development account owns in the first block."""
    subnet_cost_rao: int = 1000 * RAO
    """What a new subnet costs. It doesn't move, unlike the real chain's."""
    burn_rao: int = RAO // 10
    """What a registration costs in a new subnet. It doesn't move either."""
    tempo: int = 20
    """Of a new subnet: blocks from epoch to epoch."""
    weights_rate_limit: int = 10
    """Of a new subnet: blocks between two sets of weights of one neuron."""
    serving_rate_limit: int = 5
    """Of a new subnet: blocks between two announcements of one axon."""
    immunity_period: int = 100
    """Of a new subnet: blocks for which a new neuron keeps its slot."""
    max_uids: int = 256
    """Of a new subnet: slots."""
    max_validators: int = 64
    """Of a new subnet: neurons with a permit at most."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("block_ms", 20, 3_600_000),
            ("history_blocks", 16, 1_000_000),
            ("pool_size", 1, 100_000),
            ("block_size", 1, 100_000),
            ("tempo", 1, 65_535),
            ("max_uids", 1, 4096),
            ("max_validators", 1, 4096),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"devnet {name} is {getattr(self, name)}; it must be {low} to {high}")
