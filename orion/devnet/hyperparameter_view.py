"""A subnet's settings as the runtime API `get_subnet_hyperparams_v3` names them.

Owns the names, which are those of the SDK and `btcli`. Must not set anything.
"""

from orion.devnet import subnets
from orion.devnet.state import Reader

_U16, _U32, _U64, _BOOL, _TAO, _U64F64 = "U16", "U32", "U64", "Bool", "TaoBalance", "U64F64"

_ENTRIES: tuple[tuple[str, str, str], ...] = (
    ("rho", "Rho", _U16),
    ("kappa", "Kappa", _U16),
    ("immunity_period", "ImmunityPeriod", _U16),
    ("min_allowed_weights", "MinAllowedWeights", _U16),
    ("max_weights_limit", "MaxWeightsLimit", _U16),
    ("tempo", "Tempo", _U16),
    ("min_difficulty", "MinDifficulty", _U64),
    ("max_difficulty", "MaxDifficulty", _U64),
    ("difficulty", "Difficulty", _U64),
    ("weights_version", "WeightsVersionKey", _U64),
    ("weights_rate_limit", "WeightsSetRateLimit", _U64),
    ("adjustment_interval", "AdjustmentInterval", _U16),
    ("activity_cutoff_factor", "ActivityCutoffFactorMilli", _U32),
    ("registration_allowed", "NetworkRegistrationAllowed", _BOOL),
    ("network_pow_registration_allowed", "NetworkPowRegistrationAllowed", _BOOL),
    ("target_regs_per_interval", "TargetRegistrationsPerInterval", _U16),
    ("min_burn", "MinBurn", _TAO),
    ("max_burn", "MaxBurn", _TAO),
    ("bonds_moving_avg", "BondsMovingAverage", _U64),
    ("max_regs_per_block", "MaxRegistrationsPerBlock", _U16),
    ("serving_rate_limit", "ServingRateLimit", _U64),
    ("max_validators", "MaxAllowedValidators", _U16),
    ("adjustment_alpha", "AdjustmentAlpha", _U64),
    ("commit_reveal_period", "RevealPeriodEpochs", _U64),
    ("commit_reveal_weights_enabled", "CommitRevealWeightsEnabled", _BOOL),
    ("liquid_alpha_enabled", "LiquidAlphaOn", _BOOL),
    ("bonds_penalty", "BondsPenalty", _U16),
    ("min_childkey_take", "MinChildkeyTakePerSubnet", _U16),
    ("owner_immune_neuron_limit", "ImmuneOwnerUidsLimit", _U16),
    ("max_allowed_uids", "MaxAllowedUids", _U16),
    ("burn_increase_mult", "BurnIncreaseMult", _U64F64),
    ("burn_half_life", "BurnHalfLife", _U16),
    ("collateral_lock_share", "CollateralLockShare", _U16),
    ("collateral_drain_ratio", "CollateralDrainRatio", _U64F64),
    ("yuma3_enabled", "Yuma3On", _BOOL),
    ("subnet_is_active", "SubtokenEnabled", _BOOL),
    ("subnet_emission_enabled", "SubnetEmissionEnabled", _BOOL),
    ("bonds_reset_enabled", "BondsResetOn", _BOOL),
    ("transfers_enabled", "TransferToggle", _BOOL),
    ("owner_cut_enabled", "OwnerCutEnabled", _BOOL),
    ("owner_cut_auto_lock_enabled", "OwnerCutAutoLockEnabled", _BOOL),
)
"""Name, storage item, tag of the value."""


def hyperparameters(state: Reader, netuid: int) -> list[dict[str, object]] | None:
    """Every setting as name and tagged value; None for a subnet that doesn't exist."""
    if not subnets.exists(state, netuid):
        return None
    alpha_low, alpha_high = state.get("AlphaValues", netuid)
    steepness = int(state.get("AlphaSigmoidSteepness", netuid))
    values: list[tuple[str, str, object]] = [(name, tag, state.get(item, netuid)) for name, item, tag in _ENTRIES]
    values += [
        ("activity_cutoff", _U64, subnets.activity_cutoff(state, netuid)),
        ("alpha_low", _U16, alpha_low),
        ("alpha_high", _U16, alpha_high),
        ("alpha_sigmoid_steepness", "I32F32", {"bits": steepness << 32}),
        ("yuma_version", _U16, 2),
        ("user_liquidity_enabled", _BOOL, False),
    ]
    return [{"name": name.encode(), "value": {tag: value}} for name, tag, value in values]
