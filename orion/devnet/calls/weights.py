"""Setting weights in the clear, and committing to them under a timelock."""

from collections.abc import Sequence

from orion.devnet import stakes, subnets
from orion.devnet.blocks import digest
from orion.devnet.dispatch import Execution, Handler, Origin, argument_bytes, require
from orion.devnet.state import Reader

U16_MAX = 65_535
UNREVEALED_COMMITS_MAX = 10
"""Of one hotkey in one subnet; the real chain's number."""


def set_weights(
    execution: Execution, origin: Origin, *, netuid: int, dests: list[int], weights: list[int], version_key: int
) -> None:
    set_mechanism_weights(
        execution, origin, netuid=netuid, mecid=0, dests=dests, weights=weights, version_key=version_key
    )


def set_mechanism_weights(
    execution: Execution,
    origin: Origin,
    *,
    netuid: int,
    mecid: int,
    dests: list[int],
    weights: list[int],
    version_key: int,
) -> None:
    """Sets the signer's whole row of weights."""
    hotkey = origin.signed()
    state = execution.state
    require(netuid == subnets.ROOT_NETUID or subnets.exists(state, netuid), "MechanismDoesNotExist")
    require(not state.get("CommitRevealWeightsEnabled", netuid), "CommitRevealEnabled")
    require(netuid != subnets.ROOT_NETUID, "CanNotSetRootNetworkWeights")
    require(mecid < subnets.num_mechanisms(state, netuid), "MechanismDoesNotExist")
    require(len(dests) == len(weights), "WeightVecNotEqualSize")
    size = subnets.num_uids(state, netuid)
    require(len(dests) <= size, "UidsLengthExceedUidsInSubNet")
    uid = _registered(state, netuid, hotkey)
    _check_stake(state, netuid, hotkey)
    required_version = int(state.get("WeightsVersionKey", netuid))
    require(required_version == 0 or version_key >= required_version, "IncorrectWeightVersionKey")
    require(_may_set_again(execution, netuid, mecid, uid), "SettingWeightsTooFast")
    is_self_weight = dests == [uid]
    permits = subnets.vector(state, "ValidatorPermit", netuid, size)
    is_owner = state.get("SubnetOwnerHotkey", netuid) == hotkey
    require(is_self_weight or is_owner or bool(permits[uid]), "NeuronNoValidatorPermit")
    require(len(set(dests)) == len(dests), "DuplicateUids")
    require(all(target < size for target in dests), "UidVecContainInvalidOne")
    require(is_self_weight or len(dests) >= int(state.get("MinAllowedWeights", netuid)), "WeightVecLengthIsLow")
    largest_allowed = int(state.get("MaxWeightsLimit", netuid))
    require(is_self_weight or _within_limit(weights, largest_allowed), "MaxWeightExceeded")
    row = [(target, value) for target, value in zip(dests, max_upscaled(weights), strict=True) if value]
    index = subnets.storage_index(netuid, mecid)
    state.put("Weights", index, uid, value=row)
    subnets.touch(execution, netuid, mecid, uid)
    execution.emit("WeightsSet", index, uid)


def commit_timelocked_weights(
    execution: Execution, origin: Origin, *, netuid: int, commit: str, reveal_round: int, commit_reveal_version: int
) -> None:
    commit_timelocked_mechanism_weights(
        execution,
        origin,
        netuid=netuid,
        mecid=0,
        commit=commit,
        reveal_round=reveal_round,
        commit_reveal_version=commit_reveal_version,
    )


def commit_timelocked_mechanism_weights(
    execution: Execution,
    origin: Origin,
    *,
    netuid: int,
    mecid: int,
    commit: str,
    reveal_round: int,
    commit_reveal_version: int,
) -> None:
    """Keeps the encrypted weights. They are never revealed here: that takes the drand network's signatures."""
    hotkey = origin.signed()
    state = execution.state
    require(subnets.exists(state, netuid), "SubnetNotExists")
    require(mecid < subnets.num_mechanisms(state, netuid), "MechanismDoesNotExist")
    require(bool(state.get("CommitRevealWeightsEnabled", netuid)), "CommitRevealDisabled")
    require(commit_reveal_version == int(state.get("CommitRevealWeightsVersion")), "IncorrectCommitRevealVersion")
    uid = _registered(state, netuid, hotkey)
    require(_may_set_again(execution, netuid, mecid, uid), "CommittingWeightsTooFast")
    index = subnets.storage_index(netuid, mecid)
    epoch = int(state.get("SubnetEpochIndex", netuid))
    unrevealed = [entry for _, queue in state.items("TimelockedWeightCommits", index) for entry in queue]
    own = sum(1 for entry in unrevealed if entry[0] == hotkey)
    require(own < UNREVEALED_COMMITS_MAX, "TooManyUnrevealedCommits")
    queue = list(state.get("TimelockedWeightCommits", index, epoch))
    queue.append((hotkey, execution.block, commit, reveal_round))
    state.put("TimelockedWeightCommits", index, epoch, value=queue)
    subnets.touch(execution, netuid, mecid, uid)
    execution.emit(
        "TimelockedWeightsCommitted", hotkey, index, "0x" + digest(argument_bytes(commit)).hex(), reveal_round
    )


def drop_expired_commits(execution: Execution, netuid: int) -> None:
    """Forgets the commits whose epoch of revealing is over; an epoch has just begun."""
    state = execution.state
    oldest = int(state.get("SubnetEpochIndex", netuid)) - int(state.get("RevealPeriodEpochs", netuid))
    for mechanism in range(subnets.num_mechanisms(state, netuid)):
        index = subnets.storage_index(netuid, mechanism)
        for (_, epoch), _ in state.items("TimelockedWeightCommits", index):
            if epoch < oldest:
                state.remove("TimelockedWeightCommits", index, epoch)


def max_upscaled(weights: Sequence[int]) -> list[int]:
    """The same proportions with the largest at 65,535, rounded down; all zeros stay."""
    largest = max(weights, default=0)
    return [value * U16_MAX // largest for value in weights] if largest else list(weights)


def _within_limit(weights: Sequence[int], limit: int) -> bool:
    """Whether no weight is a larger share of the sum than limit / 65,535."""
    return limit == U16_MAX or max(weights, default=0) * U16_MAX <= limit * sum(weights)


def _registered(state: Reader, netuid: int, hotkey: str) -> int:
    uid = subnets.uid_of(state, netuid, hotkey)
    require(uid is not None, "HotKeyNotRegisteredInSubNet")
    assert uid is not None
    return uid


def _check_stake(state: Reader, netuid: int, hotkey: str) -> None:
    threshold = int(state.get("StakeThreshold"))
    require(stakes.total_weight(state, hotkey, netuid) >= threshold, "NotEnoughStakeToSetWeights")


def _may_set_again(execution: Execution, netuid: int, mechanism: int, uid: int) -> bool:
    last = subnets.last_update(execution.state, netuid, mechanism, uid)
    limit = int(execution.state.get("WeightsSetRateLimit", netuid))
    return last == 0 or execution.block - last >= limit


_P = "SubtensorModule"
CALLS: dict[tuple[str, str], Handler] = {
    (_P, "set_weights"): set_weights,
    (_P, "set_mechanism_weights"): set_mechanism_weights,
    (_P, "commit_timelocked_weights"): commit_timelocked_weights,
    (_P, "commit_timelocked_mechanism_weights"): commit_timelocked_mechanism_weights,
}
