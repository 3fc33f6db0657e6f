"""Making and starting subnets, and taking slots in them."""

from typing import Any

from orion.devnet import accounts, stakes, subnets
from orion.devnet.dispatch import Execution, Handler, Origin, require

_FIRST_NETUID = 1


def register_network(execution: Execution, origin: Origin, *, hotkey: str) -> None:
    _register_network(execution, origin, hotkey, None)


def register_network_with_identity(
    execution: Execution, origin: Origin, *, hotkey: str, identity: dict[str, Any] | None
) -> None:
    _register_network(execution, origin, hotkey, identity)


def _register_network(execution: Execution, origin: Origin, hotkey: str, identity: dict[str, Any] | None) -> None:
    """Makes a subnet that the signer owns; its hotkey gets slot 0."""
    coldkey = origin.signed()
    state, config = execution.state, execution.config
    require(subnets.coldkey_of(state, hotkey) in {None, coldkey}, "NonAssociatedColdKey")
    taken = set(subnets.netuids(state))
    require(len(taken) - 1 < int(state.get("SubnetLimit")), "SubnetLimitReached")
    require(accounts.can_pay(execution, coldkey, config.subnet_cost_rao), "CannotAffordLockCost")
    netuid = next(number for number in range(_FIRST_NETUID, subnets.MAX_SUBNETS) if number not in taken)
    accounts.withdraw(execution, coldkey, config.subnet_cost_rao)
    create_subnet(execution, netuid)
    state.put("SubnetOwner", netuid, value=coldkey)
    state.put("SubnetOwnerHotkey", netuid, value=hotkey)
    state.put("SubnetLocked", netuid, value=config.subnet_cost_rao)
    state.put("SubnetTAO", netuid, value=config.subnet_cost_rao)
    state.put("SubnetAlphaIn", netuid, value=config.subnet_cost_rao)
    if identity is not None:
        state.put("SubnetIdentitiesV3", netuid, value=identity)
        execution.emit("SubnetIdentitySet", netuid)
    subnets.adopt(state, hotkey, coldkey)
    subnets.append(execution, netuid, hotkey)
    execution.emit("NetworkAdded", netuid, 1)


def create_subnet(execution: Execution, netuid: int) -> None:
    """An empty subnet with this chain's settings for development."""
    state, config = execution.state, execution.config
    state.put("NetworksAdded", netuid, value=True)
    state.put("SubnetworkN", netuid, value=0)
    state.put("TotalNetworks", value=int(state.get("TotalNetworks")) + 1)
    state.put("NetworkRegisteredAt", netuid, value=execution.block)
    state.put("LastEpochBlock", netuid, value=execution.block)
    state.put("SubnetMechanism", netuid, value=1)
    values: dict[str, object] = {
        "Tempo": config.tempo,
        "MaxAllowedUids": config.max_uids,
        "MaxAllowedValidators": config.max_validators,
        "MinAllowedWeights": 1,
        "MaxWeightsLimit": 65_535,
        "WeightsSetRateLimit": config.weights_rate_limit,
        "ServingRateLimit": config.serving_rate_limit,
        "ImmunityPeriod": config.immunity_period,
        "CommitRevealWeightsEnabled": False,
        "NetworkRegistrationAllowed": True,
        "NetworkPowRegistrationAllowed": False,
        "MaxRegistrationsPerBlock": config.max_uids,
        "TargetRegistrationsPerInterval": config.max_uids,
        "Burn": config.burn_rao,
        "BurnIncreaseMult": {"bits": stakes.ONE},
        "SubnetMovingPrice": {"bits": 1 << 32},
    }
    for name, value in values.items():
        state.put(name, netuid, value=value)


def burned_register(execution: Execution, origin: Origin, *, netuid: int, hotkey: str) -> None:
    """Gives a hotkey a slot for the subnet's price, which is burnt."""
    coldkey = origin.signed()
    state = execution.state
    require(netuid != subnets.ROOT_NETUID, "RegistrationNotPermittedOnRootSubnet")
    require(subnets.exists(state, netuid), "SubnetNotExists")
    require(bool(state.get("NetworkRegistrationAllowed", netuid)), "SubNetRegistrationDisabled")
    this_block = int(state.get("RegistrationsThisBlock", netuid))
    require(this_block < int(state.get("MaxRegistrationsPerBlock", netuid)), "TooManyRegistrationsThisBlock")
    require(subnets.uid_of(state, netuid, hotkey) is None, "HotKeyAlreadyRegisteredInSubNet")
    price = int(state.get("Burn", netuid))
    require(accounts.can_pay(execution, coldkey, price), "NotEnoughBalanceToStake")
    require(subnets.coldkey_of(state, hotkey) in {None, coldkey}, "NonAssociatedColdKey")
    accounts.burn(execution, coldkey, price)
    state.put("RAORecycledForRegistration", netuid, value=state.get("RAORecycledForRegistration", netuid) + price)
    state.put("RegistrationsThisBlock", netuid, value=this_block + 1)
    subnets.adopt(state, hotkey, coldkey)
    if subnets.num_uids(state, netuid) < int(state.get("MaxAllowedUids", netuid)):
        uid = subnets.append(execution, netuid, hotkey)
    else:
        slot = subnets.slot_to_reuse(execution, netuid)
        require(slot is not None, "NoNeuronIdAvailable")
        assert slot is not None
        subnets.replace(execution, netuid, slot, hotkey)
        uid = slot
    execution.emit("NeuronRegistered", netuid, uid, hotkey)


def register_limit(execution: Execution, origin: Origin, *, netuid: int, hotkey: str, limit_price: int) -> None:
    """As `burned_register`, unless the price is above the limit."""
    require(int(execution.state.get("Burn", netuid)) <= limit_price, "RegistrationPriceLimitExceeded")
    burned_register(execution, origin, netuid=netuid, hotkey=hotkey)


def start_call(execution: Execution, origin: Origin, *, netuid: int) -> None:
    """From here on the subnet's alpha can be staked, and epochs pay."""
    state = execution.state
    signer = origin.signed()
    require(subnets.exists(state, netuid), "SubnetNotExists")
    require(state.get("SubnetOwner", netuid) == signer, "NotSubnetOwner")
    require(state.get("FirstEmissionBlockNumber", netuid) is None, "FirstEmissionBlockNumberAlreadySet")
    earliest = int(state.get("NetworkRegisteredAt", netuid)) + int(state.get("StartCallDelay"))
    require(execution.block >= earliest, "NeedWaitingMoreBlocksToStarCall")
    state.put("FirstEmissionBlockNumber", netuid, value=execution.block + 1)
    state.put("SubtokenEnabled", netuid, value=True)
    execution.emit("FirstEmissionBlockNumberSet", netuid, execution.block + 1)


def try_associate_hotkey(execution: Execution, origin: Origin, *, hotkey: str) -> None:
    """The signer owns a hotkey that nobody owns yet."""
    coldkey = origin.signed()
    require(subnets.coldkey_of(execution.state, hotkey) in {None, coldkey}, "NonAssociatedColdKey")
    subnets.adopt(execution.state, hotkey, coldkey)


def set_subnet_identity(execution: Execution, origin: Origin, *, netuid: int, **identity: str) -> None:
    """Name and addresses of a subnet, by its owner."""
    signer = origin.signed()
    require(execution.state.get("SubnetOwner", netuid) == signer, "NotSubnetOwner")
    execution.state.put("SubnetIdentitiesV3", netuid, value=identity)
    execution.emit("SubnetIdentitySet", netuid)


def update_symbol(execution: Execution, origin: Origin, *, netuid: int, symbol: str) -> None:
    """The sign of a subnet's alpha, by its owner. The real chain takes only signs of its own list."""
    signer = origin.signed()
    require(execution.state.get("SubnetOwner", netuid) == signer, "NotSubnetOwner")
    taken = {value for _, value in execution.state.items("TokenSymbol")}
    require(symbol not in taken, "SymbolAlreadyInUse")
    execution.state.put("TokenSymbol", netuid, value=symbol)
    execution.emit("SymbolUpdated", netuid=netuid, symbol=symbol)


_P = "SubtensorModule"
CALLS: dict[tuple[str, str], Handler] = {
    (_P, "register_network"): register_network,
    (_P, "register_network_with_identity"): register_network_with_identity,
    (_P, "burned_register"): burned_register,
    (_P, "register_limit"): register_limit,
    (_P, "start_call"): start_call,
    (_P, "try_associate_hotkey"): try_associate_hotkey,
    (_P, "set_subnet_identity"): set_subnet_identity,
    (_P, "update_symbol"): update_symbol,
}
