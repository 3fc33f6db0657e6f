"""Settings of a subnet and of the chain: the AdminUtils calls.

What its owner may set and within which bounds follows the real chain. The root (//Alice through `Sudo.sudo`) may set
everything, within what the type holds: so a development subnet can have a tempo of a few blocks. The real chain's
limits on how often, and its freeze before an epoch, are left out.
"""

from dataclasses import dataclass
from typing import Any

from orion.devnet import subnets
from orion.devnet.dispatch import BadOrigin, DispatchError, Execution, Handler, Origin, require

_ADMIN = "AdminUtils"
_MIN_TEMPO, _MAX_TEMPO = 360, 50_400
_MIN_ACTIVITY_FACTOR, _MAX_ACTIVITY_FACTOR = 1_000, 50_000


@dataclass(frozen=True)
class Setting:
    """One call `sudo_set_…` with a subnet and a value."""

    item: str
    """The storage item that it sets."""
    event: str | None = None
    """Its event of the main pallet, with the subnet and the value; None where it has none there."""
    owner: bool = False
    """Whether the subnet's owner may make it."""
    low: int = 0
    high: int | None = None
    """Bounds for the owner; the root has none."""
    error: str = "ValueNotInBounds"
    """What AdminUtils answers outside the bounds."""


SETTINGS: dict[str, Setting] = {
    "sudo_set_activity_cutoff_factor": Setting(
        "ActivityCutoffFactorMilli", owner=True, low=_MIN_ACTIVITY_FACTOR, high=_MAX_ACTIVITY_FACTOR
    ),
    "sudo_set_adjustment_alpha": Setting("AdjustmentAlpha", "AdjustmentAlphaSet", owner=True),
    "sudo_set_adjustment_interval": Setting("AdjustmentInterval", "AdjustmentIntervalSet"),
    "sudo_set_alpha_sigmoid_steepness": Setting("AlphaSigmoidSteepness", "AlphaSigmoidSteepnessSet", owner=True),
    "sudo_set_bonds_moving_average": Setting(
        "BondsMovingAverage", "BondsMovingAverageSet", owner=True, high=975_000, error="BondsMovingAverageMaxReached"
    ),
    "sudo_set_bonds_penalty": Setting("BondsPenalty", "BondsPenaltySet", owner=True),
    "sudo_set_bonds_reset_enabled": Setting("BondsResetOn", owner=True),
    "sudo_set_burn_half_life": Setting("BurnHalfLife", owner=True, low=1),
    "sudo_set_burn_increase_mult": Setting("BurnIncreaseMult", owner=True),
    "sudo_set_collateral_drain_ratio": Setting("CollateralDrainRatio", owner=True),
    "sudo_set_commit_reveal_weights_enabled": Setting("CommitRevealWeightsEnabled", "CommitRevealEnabled", owner=True),
    "sudo_set_commit_reveal_weights_interval": Setting(
        "RevealPeriodEpochs", "CommitRevealPeriodsSet", owner=True, low=1, high=100
    ),
    "sudo_set_difficulty": Setting("Difficulty", "DifficultySet"),
    "sudo_set_immunity_period": Setting("ImmunityPeriod", "ImmunityPeriodSet", owner=True),
    "sudo_set_kappa": Setting("Kappa", "KappaSet"),
    "sudo_set_liquid_alpha_enabled": Setting("LiquidAlphaOn", owner=True),
    "sudo_set_max_allowed_uids": Setting("MaxAllowedUids", "MaxAllowedUidsSet", owner=True, high=4096),
    "sudo_set_max_allowed_validators": Setting("MaxAllowedValidators", "MaxAllowedValidatorsSet"),
    "sudo_set_max_burn": Setting("MaxBurn", "MaxBurnSet", owner=True),
    "sudo_set_max_difficulty": Setting("MaxDifficulty", "MaxDifficultySet", owner=True),
    "sudo_set_max_registrations_per_block": Setting("MaxRegistrationsPerBlock", "MaxRegistrationsPerBlockSet"),
    "sudo_set_min_allowed_uids": Setting("MinAllowedUids", "MinAllowedUidsSet"),
    "sudo_set_min_allowed_weights": Setting("MinAllowedWeights", "MinAllowedWeightSet", owner=True),
    "sudo_set_min_burn": Setting("MinBurn", "MinBurnSet", owner=True),
    "sudo_set_min_childkey_take_per_subnet": Setting(
        "MinChildkeyTakePerSubnet", "MinChildKeyTakePerSubnetSet", owner=True
    ),
    "sudo_set_min_difficulty": Setting("MinDifficulty", "MinDifficultySet"),
    "sudo_set_network_pow_registration_allowed": Setting(
        "NetworkPowRegistrationAllowed", "PowRegistrationAllowed", owner=True
    ),
    "sudo_set_network_registration_allowed": Setting("NetworkRegistrationAllowed", "RegistrationAllowed", owner=True),
    "sudo_set_owner_cut_auto_lock_enabled": Setting("OwnerCutAutoLockEnabled", owner=True),
    "sudo_set_owner_cut_enabled": Setting("OwnerCutEnabled", owner=True),
    "sudo_set_owner_immune_neuron_limit": Setting("ImmuneOwnerUidsLimit", owner=True, low=1, high=10),
    "sudo_set_rho": Setting("Rho", "RhoSet", owner=True),
    "sudo_set_serving_rate_limit": Setting("ServingRateLimit", "ServingRateLimitSet", owner=True),
    "sudo_set_subtoken_enabled": Setting("SubtokenEnabled"),
    "sudo_set_target_registrations_per_interval": Setting(
        "TargetRegistrationsPerInterval", "RegistrationPerIntervalSet"
    ),
    "sudo_set_tempo": Setting("Tempo", "TempoSet", owner=True, low=_MIN_TEMPO, high=_MAX_TEMPO),
    "sudo_set_toggle_transfer": Setting("TransferToggle", "TransferToggle", owner=True),
    "sudo_set_weights_set_rate_limit": Setting("WeightsSetRateLimit", "WeightsSetRateLimitSet"),
    "sudo_set_weights_version_key": Setting("WeightsVersionKey", "WeightsVersionKeySet", owner=True),
    "sudo_set_yuma3_enabled": Setting("Yuma3On", owner=True),
}

CHAIN_SETTINGS: dict[str, tuple[str, str]] = {
    "sudo_set_network_rate_limit": ("NetworkRateLimit", "NetworkRateLimitSet"),
    "sudo_set_stake_threshold": ("StakeThreshold", "StakeThresholdSet"),
    "sudo_set_start_call_delay": ("StartCallDelay", "StartCallDelaySet"),
    "sudo_set_subnet_limit": ("SubnetLimit", "SubnetLimitSet"),
    "sudo_set_subnet_owner_cut": ("SubnetOwnerCut", "SubnetOwnerCutSet"),
    "sudo_set_tx_rate_limit": ("TxRateLimit", "TxRateLimitSet"),
}
"""The root's settings of the whole chain, with item and event."""


def _check_owner_or_root(execution: Execution, origin: Origin, netuid: int) -> None:
    require(subnets.exists(execution.state, netuid), "SubnetDoesNotExist", _ADMIN)
    if not origin.is_root and execution.state.get("SubnetOwner", netuid) != origin.signer:
        raise BadOrigin


def _setter(setting: Setting) -> Handler:
    def set_value(execution: Execution, origin: Origin, *, netuid: int, **value: Any) -> None:
        (new,) = value.values()
        if not setting.owner:
            origin.require_root()
        _check_owner_or_root(execution, origin, netuid)
        if not origin.is_root and isinstance(new, int):
            high = new if setting.high is None else setting.high
            require(setting.low <= new <= high, setting.error, _ADMIN)
        _check_size(execution, netuid, setting.item, new)
        execution.state.put(setting.item, netuid, value=new)
        if setting.item == "Tempo":
            # A new tempo begins a new epoch, as on the real chain.
            execution.state.put("LastEpochBlock", netuid, value=execution.block)
        if setting.event is not None:
            execution.emit(setting.event, netuid, new)

    return set_value


def _check_size(execution: Execution, netuid: int, item: str, new: Any) -> None:
    """What would put the subnet at odds with itself."""
    if item == "MaxAllowedUids" and new < subnets.num_uids(execution.state, netuid):
        raise DispatchError("MaxAllowedUIdsLessThanCurrentUIds", _ADMIN)
    if item == "MaxAllowedValidators" and new > int(execution.state.get("MaxAllowedUids", netuid)):
        raise DispatchError("MaxValidatorsLargerThanMaxUIds", _ADMIN)


def _chain_setter(item: str, event: str) -> Handler:
    def set_value(execution: Execution, origin: Origin, **value: Any) -> None:
        (new,) = value.values()
        origin.require_root()
        execution.state.put(item, value=new)
        execution.emit(event, new)

    return set_value


def sudo_set_alpha_values(
    execution: Execution, origin: Origin, *, netuid: int, alpha_low: int, alpha_high: int
) -> None:
    _check_owner_or_root(execution, origin, netuid)
    require(alpha_low <= alpha_high, "AlphaLowOutOfRange")
    execution.state.put("AlphaValues", netuid, value=(alpha_low, alpha_high))


def sudo_set_collateral_lock_share(execution: Execution, origin: Origin, *, netuid: int, lock_share: int) -> None:
    """This chain has no collateral: only none can be asked for."""
    _check_owner_or_root(execution, origin, netuid)
    require(lock_share == 0, "CollateralLockShareTooHigh", _ADMIN)


def sudo_set_sn_owner_hotkey(execution: Execution, origin: Origin, *, netuid: int, hotkey: str) -> None:
    _check_owner_or_root(execution, origin, netuid)
    execution.state.put("SubnetOwnerHotkey", netuid, value=hotkey)
    execution.emit("SubnetOwnerHotkeySet", netuid, hotkey)


def trigger_epoch(execution: Execution, origin: Origin, *, netuid: int) -> None:
    """The owner wants the next epoch to run with this block."""
    require(subnets.exists(execution.state, netuid), "SubnetNotExists")
    signer = origin.signed()
    require(execution.state.get("SubnetOwner", netuid) == signer, "NotSubnetOwner")
    require(int(execution.state.get("PendingEpochAt", netuid)) == 0, "EpochTriggerAlreadyPending")
    execution.state.put("PendingEpochAt", netuid, value=execution.block)
    execution.emit("EpochTriggered", netuid=netuid, by=signer, fires_at=execution.block)


def set_tempo(execution: Execution, origin: Origin, *, netuid: int, tempo: int) -> None:
    """The owner's own call for the tempo."""
    require(subnets.exists(execution.state, netuid), "SubnetNotExists")
    require(execution.state.get("SubnetOwner", netuid) == origin.signed(), "NotSubnetOwner")
    require(_MIN_TEMPO <= tempo <= _MAX_TEMPO, "TempoOutOfBounds")
    execution.state.put("Tempo", netuid, value=tempo)
    execution.state.put("LastEpochBlock", netuid, value=execution.block)
    execution.emit("TempoSet", netuid, tempo)


CALLS: dict[tuple[str, str], Handler] = {
    **{(_ADMIN, name): _setter(setting) for name, setting in SETTINGS.items()},
    **{(_ADMIN, name): _chain_setter(item, event) for name, (item, event) in CHAIN_SETTINGS.items()},
    (_ADMIN, "sudo_set_alpha_values"): sudo_set_alpha_values,
    (_ADMIN, "sudo_set_collateral_lock_share"): sudo_set_collateral_lock_share,
    (_ADMIN, "sudo_set_sn_owner_hotkey"): sudo_set_sn_owner_hotkey,
    ("SubtensorModule", "trigger_epoch"): trigger_epoch,
    ("SubtensorModule", "set_tempo"): set_tempo,
}
