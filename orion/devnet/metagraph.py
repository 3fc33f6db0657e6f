"""The metagraph and the neurons as the runtime APIs give them.

Owns the shape of those answers. Must not change state.
"""

from typing import Any

from orion.devnet import stakes, subnets
from orion.devnet.accounts import NOBODY
from orion.devnet.state import Reader
from orion.devnet.subnets import vector

NO_AXON: dict[str, int] = {
    "block": 0,
    "version": 0,
    "ip": 0,
    "port": 0,
    "ip_type": 0,
    "protocol": 0,
    "placeholder1": 0,
    "placeholder2": 0,
}
NO_PROMETHEUS: dict[str, int] = {"block": 0, "version": 0, "ip": 0, "port": 0, "ip_type": 0}

_SUBNET_ITEMS: dict[str, str] = {
    "network_registered_at": "NetworkRegisteredAt",
    "owner_hotkey": "SubnetOwnerHotkey",
    "owner_coldkey": "SubnetOwner",
    "identity": "SubnetIdentitiesV3",
    "tempo": "Tempo",
    "last_step": "LastMechansimStepBlock",
    "blocks_since_last_step": "BlocksSinceLastStep",
    "alpha_in": "SubnetAlphaIn",
    "alpha_out": "SubnetAlphaOut",
    "tao_in": "SubnetTAO",
    "alpha_out_emission": "SubnetAlphaOutEmission",
    "alpha_in_emission": "SubnetAlphaInEmission",
    "tao_in_emission": "SubnetTaoInEmission",
    "subnet_volume": "SubnetVolume",
    "moving_price": "SubnetMovingPrice",
    "rho": "Rho",
    "kappa": "Kappa",
    "min_allowed_weights": "MinAllowedWeights",
    "max_weights_limit": "MaxWeightsLimit",
    "weights_version": "WeightsVersionKey",
    "weights_rate_limit": "WeightsSetRateLimit",
    "max_validators": "MaxAllowedValidators",
    "num_uids": "SubnetworkN",
    "max_uids": "MaxAllowedUids",
    "burn": "Burn",
    "difficulty": "Difficulty",
    "registration_allowed": "NetworkRegistrationAllowed",
    "pow_registration_allowed": "NetworkPowRegistrationAllowed",
    "immunity_period": "ImmunityPeriod",
    "min_difficulty": "MinDifficulty",
    "max_difficulty": "MaxDifficulty",
    "min_burn": "MinBurn",
    "max_burn": "MaxBurn",
    "adjustment_alpha": "AdjustmentAlpha",
    "adjustment_interval": "AdjustmentInterval",
    "target_regs_per_interval": "TargetRegistrationsPerInterval",
    "max_regs_per_block": "MaxRegistrationsPerBlock",
    "serving_rate_limit": "ServingRateLimit",
    "commit_reveal_weights_enabled": "CommitRevealWeightsEnabled",
    "commit_reveal_period": "RevealPeriodEpochs",
    "liquid_alpha_enabled": "LiquidAlphaOn",
    "bonds_moving_avg": "BondsMovingAverage",
}
"""Fields of the metagraph that are storage items of the subnet as they stand."""


def metagraph(state: Reader, netuid: int, mechanism: int = 0) -> dict[str, Any] | None:
    """The whole subnet; None where there is none."""
    if not subnets.exists(state, netuid) or mechanism >= subnets.num_mechanisms(state, netuid):
        return None
    hotkeys = subnets.hotkeys(state, netuid)
    alpha_low, alpha_high = state.get("AlphaValues", netuid)
    dividends = [(hotkey, state.get("AlphaDividendsPerSubnet", netuid, hotkey)) for hotkey in hotkeys]
    return {
        **{field: state.get(item, netuid) for field, item in _SUBNET_ITEMS.items()},
        **_by_uid(state, netuid, mechanism, hotkeys),
        "netuid": netuid,
        "name": list(_name(state, netuid).encode()),
        "symbol": list(str(state.get("TokenSymbol", netuid)).encode()),
        "block": state.get("System.Number"),
        "subnet_emission": 0,
        "pending_alpha_emission": 0,
        "pending_root_emission": 0,
        "activity_cutoff": subnets.activity_cutoff(state, netuid),
        "alpha_high": alpha_high,
        "alpha_low": alpha_low,
        "tao_dividends_per_hotkey": [],
        "alpha_dividends_per_hotkey": dividends,
    }


def _by_uid(state: Reader, netuid: int, mechanism: int, hotkeys: list[str]) -> dict[str, list[Any]]:
    size = len(hotkeys)
    index = subnets.storage_index(netuid, mechanism)
    zeros = [0] * size
    alpha = [stakes.hotkey_alpha(state, hotkey, netuid) for hotkey in hotkeys]
    root = [stakes.root_weight(state, hotkey) for hotkey in hotkeys]
    incentive = vector(state, "Incentive", index, size)
    return {
        "hotkeys": hotkeys,
        "coldkeys": [state.get("Owner", hotkey) for hotkey in hotkeys],
        "identities": [state.get("IdentitiesV2", state.get("Owner", hotkey)) for hotkey in hotkeys],
        "axons": [state.get("Axons", netuid, hotkey) or NO_AXON for hotkey in hotkeys],
        "active": vector(state, "Active", netuid, size),
        "validator_permit": vector(state, "ValidatorPermit", netuid, size),
        "pruning_score": zeros,
        "last_update": [subnets.last_update(state, netuid, mechanism, uid) for uid in range(size)],
        "emission": vector(state, "Emission", netuid, size),
        "dividends": vector(state, "Dividends", netuid, size),
        "incentives": incentive,
        "consensus": vector(state, "Consensus", netuid, size),
        "trust": zeros,
        "rank": incentive,
        "block_at_registration": [state.get("BlockAtRegistration", netuid, uid) for uid in range(size)],
        "alpha_stake": alpha,
        "tao_stake": root,
        "total_stake": [own + rooted for own, rooted in zip(alpha, root, strict=True)],
        "collateral_locked": zeros,
        "collateral_min": zeros,
        "collateral_earned": zeros,
    }


def neuron(state: Reader, netuid: int, uid: int, *, lite: bool) -> dict[str, Any] | None:
    """One neuron; None where there is none. `lite` leaves out its weights and bonds."""
    size = subnets.num_uids(state, netuid)
    if uid >= size:
        return None
    hotkey = state.get("Keys", netuid, uid)
    coldkey = subnets.coldkey_of(state, hotkey) or NOBODY
    incentive = vector(state, "Incentive", netuid, size)[uid]
    found = {
        "hotkey": hotkey,
        "coldkey": coldkey,
        "uid": uid,
        "netuid": netuid,
        "active": vector(state, "Active", netuid, size)[uid],
        "axon_info": state.get("Axons", netuid, hotkey) or NO_AXON,
        "prometheus_info": state.get("Prometheus", netuid, hotkey) or NO_PROMETHEUS,
        "stake": [(coldkey, stakes.total_weight(state, hotkey, netuid))],
        "rank": incentive,
        "emission": vector(state, "Emission", netuid, size)[uid],
        "incentive": incentive,
        "consensus": vector(state, "Consensus", netuid, size)[uid],
        "trust": 0,
        "validator_trust": vector(state, "ValidatorTrust", netuid, size)[uid],
        "dividends": vector(state, "Dividends", netuid, size)[uid],
        "last_update": subnets.last_update(state, netuid, 0, uid),
        "validator_permit": vector(state, "ValidatorPermit", netuid, size)[uid],
        "pruning_score": 0,
    }
    if not lite:
        found["weights"] = state.get("Weights", netuid, uid)
        found["bonds"] = state.get("Bonds", netuid, uid)
    return found


def _name(state: Reader, netuid: int) -> str:
    identity = state.get("SubnetIdentitiesV3", netuid)
    if identity and identity["subnet_name"]:
        return str(identity["subnet_name"])
    return "root" if netuid == subnets.ROOT_NETUID else f"subnet {netuid}"
