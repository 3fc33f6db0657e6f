"""The subnet of a local swarm: made on a fresh development chain, and looked at when the swarm is done.

Owns what such a subnet's rules are and who is registered on it. Everything goes through the SDK, as on any chain.
"""

import asyncio
from collections.abc import Mapping, Sequence

from orion.cli.chain_access import Subnet, open_chain
from orion.common.errors import OrionError, TransportError
from orion.common.ids import Hotkey
from orion.common.net.bittensor_client import BittensorClient
from orion.common.net.chain import Chain, Metagraph
from orion.common.net.coldkey import RAO, Coldkey
from orion.common.protocol.signing import Keypair, keypair_from_uri

NETUID = 1
"""Of the first subnet on a fresh chain."""
ROOT_URI = "//Alice"
"""The development account that owns TAO from the start and may set every rule."""
RULES: Mapping[str, int | bool] = {
    "tempo": 10,
    "weights_set_rate_limit": 4,
    "serving_rate_limit": 0,
    "commit_reveal_weights_enabled": False,
    "min_allowed_weights": 1,
    "immunity_period": 10_000,
    "max_allowed_validators": 1,
    "activity_cutoff_factor": 1_000_000,
}
"""Epochs of a few seconds, so that permits, weights and incentive come within a short run; open weights, so that they
can be read at its end. One permit: what miners earn is staked, and would soon give them one too. Weights count for a
thousand epochs (the factor is per mille of the tempo), so that a swarm that is kept still shows who earns what."""
_OWNER_FUNDS_RAO = 100_000 * RAO
_VALIDATOR_STAKE_RAO = 1_000 * RAO
_POLL_S = 0.2


class SubnetError(OrionError):
    """The local subnet is not as it was made to be."""


async def answers(subnet: Subnet) -> bool:
    """Whether the chain is up."""
    try:
        async with open_chain(subnet) as chain:
            await chain.block()
    except TransportError:
        return False
    return True


async def set_up(
    subnet: Subnet, *, owner: Keypair, owner_hotkey: Hotkey, validator: Hotkey, others: Sequence[Hotkey]
) -> None:
    """Makes the subnet, owned by the coldkey `owner`, which also pays for everybody's slot and the validator's stake.

    The validator's permit comes with the next epoch. Raises ChainError, TransportError, SubnetError.
    """
    async with BittensorClient(subnet.network) as client:
        root, payer = Coldkey(client, keypair_from_uri(ROOT_URI)), Coldkey(client, owner)
        await root.pay(owner.ss58_address, _OWNER_FUNDS_RAO)
        netuid = await payer.make_subnet(owner_hotkey)
        if netuid != subnet.netuid:
            raise SubnetError(f"the first subnet of the chain at {subnet.network} has the number {netuid}: not fresh")
        await asyncio.gather(
            root.set_rules(netuid, RULES),
            payer.start(netuid),
            *(payer.register_openly(netuid, hotkey) for hotkey in (validator, *others)),
        )
        await payer.stake(netuid, validator, _VALIDATOR_STAKE_RAO)


async def register_more(subnet: Subnet, owner: Keypair, hotkey: Hotkey) -> int:
    """Gives one more hotkey a slot, paid for by the owner; its uid."""
    async with BittensorClient(subnet.network) as client:
        return await Coldkey(client, owner).register(subnet.netuid, hotkey)


async def weights_by_hotkey(chain: Chain, validator: Hotkey) -> dict[Hotkey, float]:
    """What the validator has set: shares that sum to 1; empty when it has set nothing."""
    weights = await chain.weights_of(validator)
    hotkeys = {neuron.uid: neuron.hotkey for neuron in (await chain.metagraph()).neurons}
    return {hotkeys[uid]: share for uid, share in weights.items()}


async def after_next_epoch(chain: Chain) -> Metagraph:
    """The subnet once an epoch has run from now on: incentives then follow from the weights that are set now.

    Raises SubnetError when that epoch does not come in twice its time.
    """
    left = await chain.blocks_to_epoch()
    if left is None:
        raise SubnetError("the subnet has no epochs")
    wanted = await chain.block() + left + 1
    limit_s = 10.0 + 2 * (left + 1) * (await chain.hyperparameters()).block_s
    try:
        async with asyncio.timeout(limit_s):
            while True:
                metagraph = await chain.metagraph()
                if metagraph.block >= wanted:
                    return metagraph
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise SubnetError(f"block {wanted} has not come within {limit_s:.0f} s") from None
