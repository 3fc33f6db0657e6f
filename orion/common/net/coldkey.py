"""What is done with a coldkey: paying, registering, staking, and making a subnet.

Only `orion register` and the setting up of a local chain use it; no role does. Amounts are rao, 1e-9 TAO.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import bittensor

from orion.common.ids import Hotkey
from orion.common.net.bittensor_client import BittensorClient
from orion.common.net.chain import ChainError, ChainErrorCode
from orion.common.protocol.signing import Keypair

RAO: Final = 1_000_000_000
"""In one TAO."""
Storage: Final = bittensor.storage.SubtensorModule


async def balance_of(client: BittensorClient, address: str) -> int:
    """What an address can spend. Raises ChainError, TransportError, as everything here."""
    account = await client.ask(lambda sdk: sdk.query(bittensor.storage.System.Account, [address]))
    return int(account["data"]["free"])


async def registration_cost(client: BittensorClient, netuid: int) -> int:
    """What a slot of the subnet costs now. It moves with demand."""
    exists, cost = await client.ask(
        lambda sdk: asyncio.gather(sdk.query(Storage.NetworksAdded, [netuid]), sdk.query(Storage.Burn, [netuid]))
    )
    if not exists:
        raise ChainError(ChainErrorCode.NO_SUBNET, f"there is no subnet {netuid}")
    return int(cost)


async def uid_of(client: BittensorClient, netuid: int, hotkey: Hotkey) -> int | None:
    """The hotkey's slot, None when it has none."""
    uid = await client.ask(lambda sdk: sdk.query(Storage.Uids, [netuid, hotkey]))
    return None if uid is None else int(uid)


class Coldkey:
    """One coldkey at work. What it does is final when the call returns."""

    def __init__(self, client: BittensorClient, keypair: Keypair) -> None:
        self._client = client
        self._keypair = keypair

    async def register(self, netuid: int, hotkey: Hotkey) -> int:
        """Buys a slot for the hotkey; its uid. Encrypted until it is executed where the chain offers that, so that
        nobody can slip in between; openly elsewhere. Takes two nonces: do nothing else with this coldkey meanwhile."""
        if not await self._is_shielded():
            return await self.register_openly(netuid, hotkey)
        intent = bittensor.BurnedRegister(netuid=netuid, hotkey_ss58=hotkey)
        await self._client.execute(intent, self._keypair)
        return await self._uid_of(netuid, hotkey)

    async def register_openly(self, netuid: int, hotkey: Hotkey) -> int:
        """The same for all to see: one transaction, so that many can be under way at once. Enough where nobody else
        is."""
        await self._call(bittensor.calls.SubtensorModule.burned_register(netuid=netuid, hotkey=hotkey))
        return await self._uid_of(netuid, hotkey)

    async def pay(self, address: str, rao: int) -> None:
        await self._call(bittensor.calls.Balances.transfer_keep_alive(dest=address, value=rao))

    async def stake(self, netuid: int, hotkey: Hotkey, rao: int) -> None:
        """Puts TAO behind a hotkey on a subnet that has been started."""
        calls = bittensor.calls.SubtensorModule
        await self._call(calls.add_stake(hotkey=hotkey, netuid=netuid, amount_staked=rao))

    async def make_subnet(self, hotkey: Hotkey) -> int:
        """Makes a subnet that this coldkey owns and the hotkey earns for; its netuid. It costs what the chain asks."""
        result = await self._client.execute(bittensor.RegisterSubnet(hotkey_ss58=hotkey), self._keypair)
        return int(result.data["netuid"])

    async def start(self, netuid: int) -> None:
        """Lets a subnet of this coldkey begin: stakes count, epochs run."""
        await self._call(bittensor.calls.SubtensorModule.start_call(netuid=netuid))

    async def set_rules(self, netuid: int, rules: Mapping[str, int | bool]) -> None:
        """As root (a development chain's first account): sets hyperparameters, named as the `sudo_set_…` calls."""
        calls = bittensor.calls.AdminUtils
        await asyncio.gather(
            *(self._sudo(getattr(calls, f"sudo_set_{name}")(netuid, value)) for name, value in rules.items())
        )

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _uid_of(self, netuid: int, hotkey: Hotkey) -> int:
        uid = await uid_of(self._client, netuid, hotkey)
        if uid is None:
            raise ChainError(ChainErrorCode.OTHER, f"{hotkey} was registered but has no slot any more")
        return uid

    async def _sudo(self, call: Any) -> None:
        composed = await self._client.ask(lambda sdk: sdk.compose(call))
        await self._call(bittensor.calls.Sudo.sudo(composed))

    async def _call(self, call: Any) -> None:
        await self._client.call(call, self._keypair, "coldkey")

    async def _is_shielded(self) -> bool:
        try:
            return bool(await self._client.ask(lambda sdk: sdk.query(bittensor.storage.MevShield.NextKey)))
        except ChainError as error:
            if error.code is not ChainErrorCode.UNSUPPORTED:
                raise
            return False
