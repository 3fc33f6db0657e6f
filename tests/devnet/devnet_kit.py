"""What the tests of the development chain share: wallets of development accounts, and a swarm's first steps."""

from dataclasses import dataclass

import bittensor as bt
from bittensor.sp_core import Keypair


@dataclass(frozen=True)
class DevWallet:
    """A wallet of two development keys, as the SDK takes it."""

    name: str

    @property
    def coldkey(self) -> Keypair:
        return Keypair.create_from_uri(f"//{self.name}")

    @property
    def coldkeypub(self) -> Keypair:
        return self.coldkey

    @property
    def hotkey(self) -> Keypair:
        return Keypair.create_from_uri(f"//{self.name}//hotkey")

    @property
    def hotkeypub(self) -> Keypair:
        return self.hotkey


ALICE, BOB, CHARLIE, DAVE = DevWallet("Alice"), DevWallet("Bob"), DevWallet("Charlie"), DevWallet("Dave")


def succeed(result: bt.ExtrinsicResult) -> list[str]:
    """The names of an extrinsic's events, which must have succeeded."""
    assert result.success, result.message
    return [event["event"]["event_id"] for event in result.events]


async def register(subtensor: bt.Client, wallet: DevWallet, netuid: int = 1) -> bt.ExtrinsicResult:
    """Gives the wallet's hotkey a slot, by the raw call: the SDK's intent insists on the MEV shield."""
    call = bt.calls.SubtensorModule.burned_register(netuid=netuid, hotkey=wallet.hotkey.ss58_address)
    return await subtensor.submit_call(call, wallet)


async def as_root(subtensor: bt.Client, call: object) -> bt.ExtrinsicResult:
    """Makes a call as the root, whose key is Alice's."""
    return await subtensor.submit_call(bt.calls.Sudo.sudo(call=await subtensor.compose(call)), ALICE)


async def start_subnet(subtensor: bt.Client) -> int:
    """Alice owns a started subnet in which she has stake, and Bob and Charlie have slots 1 and 2."""
    netuid = (await subtensor.execute(bt.RegisterSubnet(), ALICE)).data["netuid"]
    succeed(await subtensor.execute(bt.StartCall(netuid=netuid), ALICE))
    for wallet in (BOB, CHARLIE):
        succeed(await register(subtensor, wallet, netuid))
    stake = bt.AddStake(hotkey_ss58=ALICE.hotkey.ss58_address, netuid=netuid, amount_tao=100)
    succeed(await subtensor.execute(stake, ALICE))
    return int(netuid)
