"""Setting weights by raw calls, for a chain whose runtime lacks something that the SDK's own way of it reads.

Owns that one fallback: the calls, in the order of preference, and the timelocked form of them. Checks nothing that the
chain checks itself.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import bittensor
import bittensor_core

from orion.common.ids import SPEC_VERSION
from orion.common.net.bittensor_client import BittensorClient
from orion.common.net.chain import ChainError, ChainErrorCode, as_u16
from orion.common.protocol.signing import Keypair

Storage: Final = bittensor.storage.SubtensorModule

_MECHANISM: Final = 0
_COMMIT_REVEAL_VERSION: Final = 4


async def set_weights_raw(client: BittensorClient, keypair: Keypair, netuid: int, weights: Mapping[int, float]) -> Any:
    """The SDK's result. Raises ChainError, TransportError."""
    row = as_u16(weights)
    if await client.ask(lambda sdk: sdk.query(Storage.CommitRevealWeightsEnabled, [netuid])):
        return await client.call(await _timelocked(client, keypair, netuid, row), keypair, "hotkey")
    fields = {"netuid": netuid, "dests": list(row), "weights": list(row.values()), "version_key": SPEC_VERSION}
    calls = bittensor.calls.SubtensorModule
    try:
        return await client.call(calls.set_mechanism_weights(mecid=_MECHANISM, **fields), keypair, "hotkey")
    except ChainError as error:
        if error.code is not ChainErrorCode.UNSUPPORTED:
            raise
    return await client.call(calls.set_weights(**fields), keypair, "hotkey")


async def _timelocked(client: BittensorClient, keypair: Keypair, netuid: int, row: Mapping[int, int]) -> Any:
    """The call that commits to a row which the chain opens at a later epoch."""
    items = (
        Storage.Tempo,
        Storage.RevealPeriodEpochs,
        Storage.LastEpochBlock,
        Storage.PendingEpochAt,
        Storage.SubnetEpochIndex,
        Storage.BlocksSinceLastStep,
    )

    async def read(sdk: Any) -> list[Any]:
        view = await sdk.at()
        found = await asyncio.gather(*(view.query(item, [netuid]) for item in items))
        return [view.block, await view.block_time(), *(int(value or 0) for value in found)]

    block, block_s, tempo, period, last_epoch, pending, epoch_index, since_step = await client.ask(read)
    commit, reveal_round = bittensor_core.get_encrypted_commit_v2(
        uids=list(row),
        weights=list(row.values()),
        version_key=SPEC_VERSION,
        last_epoch_block=last_epoch,
        pending_epoch_at=pending,
        subnet_epoch_index=epoch_index,
        tempo=tempo,
        blocks_since_last_step=since_step,
        current_block=block,
        subnet_reveal_period_epochs=period,
        block_time=block_s,
        hotkey=bytes(bittensor_core.ss58_decode(keypair.ss58_address)),
    )
    return bittensor.calls.SubtensorModule.commit_timelocked_mechanism_weights(
        netuid=netuid,
        mecid=_MECHANISM,
        commit=commit,
        reveal_round=reveal_round,
        commit_reveal_version=_COMMIT_REVEAL_VERSION,
    )
