"""The real chain behind the seam: one subnet, through the Bittensor SDK.

Owns how the roles' questions become storage items and transactions. It reads single items, whose names have held over
many runtimes, rather than the composite runtime APIs, whose layouts have not; and where an intent of the SDK needs what
this chain's runtime lacks, it falls back to the raw call. All items of one answer come from the same block.
"""

import asyncio
import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any, Final

import bittensor

from orion.common.errors import TransportError
from orion.common.ids import SPEC_VERSION, Hotkey
from orion.common.net.bittensor_client import BittensorClient
from orion.common.net.bittensor_weights import set_weights_raw
from orion.common.net.chain import (
    U16_MAX,
    ChainError,
    ChainErrorCode,
    Hyperparameters,
    Metagraph,
    Neuron,
    WeightsCommit,
    WeightsReceipt,
    axon_of,
    check_weights,
    shares_of,
    url_of,
)
from orion.common.protocol.signing import Keypair

Storage: Final = bittensor.storage.SubtensorModule
_NOW: Final = bittensor.storage.Timestamp.Now

_BLOCKS_TIMED: Final = 8
"""Blocks over which the time from one to the next is measured: the constant in the metadata need not be true."""
_PROTOCOL_HTTP, _PROTOCOL_HTTPS = 4, 5
"""What an axon's protocol field says on this subnet; 4 is what the SDK writes when nobody says anything."""


class BittensorChain:
    """One subnet of a chain. Acts as one hotkey, or reads only. Not for several event loops."""

    def __init__(self, client: BittensorClient, netuid: int, keypair: Keypair | None = None) -> None:
        """`keypair` is the hotkey that acts; reading needs none. Closing the client is the caller's business."""
        self._client = client
        self._netuid = netuid
        self._keypair = keypair
        self._metagraph: Metagraph | None = None
        """As last read; good for as long as its block is the newest."""

    async def block(self) -> int:
        return int(await self._client.ask(lambda client: client.block()))

    async def metagraph(self) -> Metagraph:
        async def read(client: Any) -> tuple[int, list[Any]]:
            view = await client.at()
            if self._metagraph is not None and view.block == self._metagraph.block:
                return view.block, []
            items = (Storage.NetworksAdded, Storage.SubnetOwnerHotkey, Storage.ValidatorPermit, Storage.LastUpdate)
            reads = [view.query(item, [self._netuid]) for item in (*items, Storage.Incentive)]
            maps = [view.query_map(item, [self._netuid]) for item in (Storage.Keys, Storage.Axons)]
            return view.block, list(await asyncio.gather(*reads, *maps))

        block, found = await self._client.ask(read)
        if found:
            if not found[0]:
                raise ChainError(ChainErrorCode.NO_SUBNET, f"there is no subnet {self._netuid}")
            self._metagraph = _metagraph(block, found[1:])
        assert self._metagraph is not None
        return self._metagraph

    async def hyperparameters(self) -> Hyperparameters:
        items = (
            Storage.Tempo,
            Storage.WeightsSetRateLimit,
            Storage.MinAllowedWeights,
            Storage.MaxWeightsLimit,
            Storage.WeightsVersionKey,
            Storage.CommitRevealWeightsEnabled,
            Storage.MaxAllowedUids,
            Storage.MaxAllowedValidators,
            Storage.ImmunityPeriod,
        )

        async def read(client: Any) -> list[Any]:
            view = await client.at()
            found = await asyncio.gather(*(view.query(item, [self._netuid]) for item in items))
            return [*found, await _block_s(client, view)]

        (
            tempo,
            rate_limit,
            least,
            largest,
            version,
            commits,
            uids,
            validators,
            immunity,
            block_s,
        ) = await self._client.ask(read)
        return Hyperparameters(
            tempo=tempo,
            weights_rate_limit_blocks=rate_limit,
            min_allowed_weights=least,
            max_weight=max(1, largest) / U16_MAX,
            weights_version=version,
            commit_reveal=commits,
            max_uids=uids,
            max_validators=validators,
            immunity_blocks=immunity,
            block_s=block_s,
        )

    async def blocks_to_epoch(self) -> int | None:
        try:
            return await self._client.ask(lambda client: client.epochs.blocks_until_next_epoch(self._netuid))
        except ChainError as error:
            if error.code is not ChainErrorCode.UNSUPPORTED:
                raise

        async def read(client: Any) -> tuple[int, int]:
            view = await client.at()
            tempo = await view.query(Storage.Tempo, [self._netuid])
            return int(tempo), int(await view.query(Storage.BlocksSinceLastStep, [self._netuid]))

        tempo, since = await self._client.ask(read)
        return max(0, tempo - since) if tempo else None

    async def set_weights(self, weights: Mapping[int, float]) -> WeightsReceipt:
        check_weights(weights)
        keypair = self._actor
        intent = bittensor.SetWeights(netuid=self._netuid, weights=dict(weights), version_key=SPEC_VERSION)
        try:
            try:
                result = await self._client.execute(intent, keypair)
            except ChainError as error:
                if error.code is not ChainErrorCode.UNSUPPORTED:
                    raise
                result = await set_weights_raw(self._client, keypair, self._netuid, weights)
        except ChainError as error:
            raise await self._with_time(error) from error
        return WeightsReceipt(
            block=await self._block_of(result), is_timelocked=result.data.get("reveal_round") is not None
        )

    async def weights_of(self, hotkey: Hotkey) -> dict[int, float]:
        async def read(client: Any) -> list[tuple[int, int]]:
            view = await client.at()
            uid = await view.query(Storage.Uids, [self._netuid, hotkey])
            if uid is None:
                raise ChainError(ChainErrorCode.NOT_REGISTERED, f"{hotkey} is not registered on the subnet")
            return list(await view.query(Storage.Weights, [self._netuid, uid]) or ())

        return shares_of({int(uid): int(units) for uid, units in await self._client.ask(read)})

    async def commits_of(self, hotkey: Hotkey) -> tuple[WeightsCommit, ...]:
        epochs = await self._client.ask(
            lambda client: client.query_map(Storage.TimelockedWeightCommits, [self._netuid])
        )
        found = [
            WeightsCommit(block=int(block), reveal_round=int(reveal_round))
            for _, commits in epochs
            for account, block, _, reveal_round in commits
            if account == hotkey
        ]
        return tuple(sorted(found, key=lambda commit: commit.block))

    async def serve_axon(self, url: str) -> None:
        address, port, is_tls = axon_of(url)
        keypair = self._actor
        found = await self._axon(Hotkey(keypair.ss58_address))
        if found is not None and _axon_url(found) == url_of(address, port, is_tls):
            return
        protocol = _PROTOCOL_HTTPS if is_tls else _PROTOCOL_HTTP
        intent = bittensor.ServeAxon(
            netuid=self._netuid, ip=address, port=port, protocol=protocol, version=SPEC_VERSION
        )
        try:
            await self._client.execute(intent, keypair)
        except ChainError as error:
            raise await self._with_time(error, served_block=0 if found is None else int(found["block"])) from error

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _actor(self) -> Keypair:
        if self._keypair is None:
            raise ValueError("this chain was opened for reading")
        return self._keypair

    async def _with_time(self, error: ChainError, *, served_block: int | None = None) -> ChainError:
        """The same error with the number of blocks after which it would go well, as far as the chain tells."""
        try:
            match error.code:
                case ChainErrorCode.NO_PERMIT | ChainErrorCode.TOO_MANY_COMMITS:
                    blocks = await self.blocks_to_epoch()
                    return ChainError(error.code, error.fault.message, None if blocks is None else blocks + 1)
                case ChainErrorCode.RATE_LIMITED:
                    blocks = await self._blocks_limited(served_block)
                    return ChainError(error.code, error.fault.message, max(1, blocks))
                case _:
                    return error
        except (ChainError, TransportError):
            return ChainError(error.code, error.fault.message, 1)  # it passes, nobody knows when

    async def _blocks_limited(self, served_block: int | None) -> int:
        block = await self.block()
        if served_block is not None:
            limit = await self._client.ask(lambda client: client.query(Storage.ServingRateLimit, [self._netuid]))
            return served_block + int(limit) - block
        limit = await self._client.ask(lambda client: client.query(Storage.WeightsSetRateLimit, [self._netuid]))
        own = (await self.metagraph()).neuron_of(Hotkey(self._actor.ss58_address))
        return 1 if own is None else own.last_update_block + int(limit) - block

    async def _axon(self, hotkey: Hotkey) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = await self._client.ask(
            lambda client: client.query(Storage.Axons, [self._netuid, hotkey])
        )
        return found

    async def _block_of(self, result: Any) -> int:
        """Block of a transaction's result: its id is `BLOCK-INDEX`."""
        block, _, _ = (result.extrinsic_id or "").partition("-")
        return int(block) if block.isdecimal() else await self.block()


async def _block_s(client: Any, view: Any) -> float:
    """Seconds from block to block, from the chain's own times of the newest blocks."""
    span = min(_BLOCKS_TIMED, view.block - 1)
    if span > 0:
        then_ms, now_ms = await asyncio.gather(client.query(_NOW, block=view.block - span), view.query(_NOW))
        if 0 < int(then_ms) < int(now_ms):
            return float((now_ms - then_ms) / span / 1000.0)
    return float(await client.block_time())


def _metagraph(block: int, found: Sequence[Any]) -> Metagraph:
    """From owner, permits, updates, incentives, keys and axons, as they are stored."""
    owner, permits, updates, incentives, keys, axons = found
    served = dict(axons)

    def at(values: list[Any], uid: int) -> Any:
        return values[uid] if uid < len(values) else 0  # the chain's vectors may be shorter than the list of keys

    return Metagraph(
        block=block,
        owner_hotkey=None if owner is None else Hotkey(owner),
        neurons=tuple(
            Neuron(
                uid=uid,
                hotkey=Hotkey(hotkey),
                validator_permit=bool(at(permits, uid)),
                last_update_block=at(updates, uid),
                incentive=at(incentives, uid) / U16_MAX,
                axon_url=_axon_url(served[hotkey]) if hotkey in served else None,
            )
            for uid, hotkey in sorted((int(uid), hotkey) for uid, hotkey in keys)
        ),
    )


def _axon_url(axon: Mapping[str, Any]) -> str | None:
    """None for a placeholder: the chain keeps those for axons that were taken back."""
    if not axon["ip"] or not axon["port"]:
        return None
    address = (ipaddress.IPv6Address if axon["ip_type"] == 6 else ipaddress.IPv4Address)(axon["ip"])
    return url_of(str(address), axon["port"], axon["protocol"] == _PROTOCOL_HTTPS)
