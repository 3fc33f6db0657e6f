"""The epoch of a subnet: reads what Yuma needs from the state, writes what it found, and pays.

Owns when an epoch runs, permits, and how the epoch's alpha is split. Must not hold Yuma's rule. What it pays, per block
since the last epoch: one alpha; of that the owner's cut (18 %), and half of the rest each to miners by incentive and to
validators by dividends. Incentive of the owner's own slot is paid to nobody. The real chain's other sources and sinks
(root's share, takes, childkeys, locks, liquid alpha) are left out. Invariant: it never pays more than that.
"""

from orion.devnet import stakes, subnets, yuma
from orion.devnet.calls.weights import U16_MAX, drop_expired_commits
from orion.devnet.config import RAO
from orion.devnet.dispatch import Execution
from orion.devnet.state import State

ALPHA_PER_BLOCK = RAO
"""Alpha that a started subnet makes in a block."""

_MILLION = 1_000_000


def run_due_epochs(execution: Execution) -> None:
    """At the end of a block: runs the epochs that are due, and counts blocks for the others."""
    state = execution.state
    for netuid in subnets.netuids(state):
        if state.get("RegistrationsThisBlock", netuid):
            state.put("RegistrationsThisBlock", netuid, value=0)
        due = subnets.next_epoch(state, netuid)
        if due is not None and execution.block >= due:
            run_epoch(execution, netuid)
        elif netuid != subnets.ROOT_NETUID:
            state.put("BlocksSinceLastStep", netuid, value=state.get("BlocksSinceLastStep", netuid) + 1)


def run_epoch(execution: Execution, netuid: int) -> None:
    """One epoch of the subnet's first mechanism. Others keep their weights but earn nothing."""
    state = execution.state
    size = subnets.num_uids(state, netuid)
    hotkeys = subnets.hotkeys(state, netuid)
    stake = [stakes.total_weight(state, hotkey, netuid) for hotkey in hotkeys]
    permits = yuma.permits(stake, int(state.get("MaxAllowedValidators", netuid)))
    cutoff = subnets.activity_cutoff(state, netuid)
    active = [subnets.last_update(state, netuid, 0, uid) + cutoff >= execution.block for uid in range(size)]
    may_validate = [permit and alive for permit, alive in zip(permits, active, strict=True)]
    result = yuma.run(_inputs(state, netuid, [float(amount) for amount in stake], may_validate))
    state.put("ValidatorPermit", netuid, value=permits)
    state.put("Active", netuid, value=active)
    state.put("Consensus", netuid, value=_u16(result.consensus))
    state.put("Incentive", netuid, value=_u16(result.incentive))
    state.put("Dividends", netuid, value=_u16(result.dividends))
    state.put("ValidatorTrust", netuid, value=_u16(result.validator_trust))
    for uid, row in enumerate(result.bonds):
        _put_bonds(state, netuid, uid, row)
    _pay(execution, netuid, hotkeys, result)
    state.put("LastEpochBlock", netuid, value=execution.block)
    state.put("LastMechansimStepBlock", netuid, value=execution.block)
    state.put("BlocksSinceLastStep", netuid, value=0)
    state.put("PendingEpochAt", netuid, value=0)
    state.put("SubnetEpochIndex", netuid, value=int(state.get("SubnetEpochIndex", netuid)) + 1)
    drop_expired_commits(execution, netuid)


def _inputs(state: State, netuid: int, stake: list[float], may_validate: list[bool]) -> yuma.Inputs:
    size = len(stake)
    registered = [int(state.get("BlockAtRegistration", netuid, uid)) for uid in range(size)]
    weights: list[dict[int, float]] = []
    bonds: list[dict[int, float]] = []
    for uid in range(size):
        set_at = subnets.last_update(state, netuid, 0, uid)
        row = state.get("Weights", netuid, uid) if may_validate[uid] else ()
        # Weights older than the neuron in the slot were meant for the one before it.
        weights.append({target: float(v) for target, v in row if target < size and set_at > registered[target]})
        bonds.append({target: float(value) for target, value in state.get("Bonds", netuid, uid) if target < size})
    return yuma.Inputs(
        stake=stake,
        may_validate=may_validate,
        weights=weights,
        bonds=bonds,
        kappa=int(state.get("Kappa", netuid)) / U16_MAX,
        bonds_moving_average=min(1.0, int(state.get("BondsMovingAverage", netuid)) / _MILLION),
        bonds_penalty=int(state.get("BondsPenalty", netuid)) / U16_MAX,
        self_weight_uid=subnets.uid_of(state, netuid, state.get("SubnetOwnerHotkey", netuid)),
    )


def _pay(execution: Execution, netuid: int, hotkeys: list[str], result: yuma.Result) -> None:
    """Credits the epoch's alpha, and notes what each uid earned."""
    state = execution.state
    total = _emission(execution, netuid)
    owner_hotkey = state.get("SubnetOwnerHotkey", netuid)
    cut = total * int(state.get("SubnetOwnerCut")) // U16_MAX if state.get("OwnerCutEnabled", netuid) else 0
    stakes.reward(state, owner_hotkey, netuid, cut)
    for_validators = (total - cut) // 2
    for_miners = total - cut - for_validators
    earned = []
    for uid, hotkey in enumerate(hotkeys):
        incentive = int(result.incentive[uid] * for_miners)
        dividend = int(result.dividends[uid] * for_validators)
        earned.append(incentive + dividend)
        stakes.reward(state, hotkey, netuid, dividend + (0 if hotkey == owner_hotkey else incentive))
        state.put("AlphaDividendsPerSubnet", netuid, hotkey, value=dividend)
    state.put("Emission", netuid, value=earned)
    state.put("SubnetAlphaOutEmission", netuid, value=ALPHA_PER_BLOCK if total else 0)


def _emission(execution: Execution, netuid: int) -> int:
    """Rao of alpha that the subnet made since its last epoch, or since it was started."""
    state = execution.state
    started = state.get("FirstEmissionBlockNumber", netuid)
    if started is None:
        return 0
    since = max(int(state.get("LastEpochBlock", netuid)), int(started) - 1)
    return max(0, execution.block - since) * ALPHA_PER_BLOCK


def _put_bonds(state: State, netuid: int, uid: int, row: dict[int, float]) -> None:
    """Bonds are kept as u16 shares of their column."""
    kept = [(target, round(value * U16_MAX)) for target, value in sorted(row.items())]
    kept = [(target, value) for target, value in kept if value]
    if kept != [tuple(entry) for entry in state.get("Bonds", netuid, uid)]:
        state.put("Bonds", netuid, uid, value=kept)


def _u16(values: list[float]) -> list[int]:
    return [min(U16_MAX, int(value * U16_MAX)) for value in values]
