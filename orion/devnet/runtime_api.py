"""The runtime APIs that the chain answers (`state_call`): decoding of arguments, the call, encoding of the result.

Owns which APIs there are. Must not change state. An API that isn't here is refused by name, as a real node refuses one
that its runtime doesn't export.
"""

from collections.abc import Callable
from typing import Any

from orion.devnet import accounts, stakes, subnets
from orion.devnet.config import RAO, DevnetConfig
from orion.devnet.hyperparameter_view import hyperparameters
from orion.devnet.metadata import compact
from orion.devnet.metagraph import metagraph, neuron
from orion.devnet.state import Reader

_METADATA_V15 = 15
_NO_WEIGHT = {"ref_time": 0, "proof_size": 0}


class UnknownApi(Exception):
    """The runtime exports no such method. The text is the real node's."""

    def __init__(self, name: str) -> None:
        super().__init__(f"Execution failed: Exported method {name} is not found")


def call_runtime_api(state: Reader, config: DevnetConfig, name: str, data: bytes) -> bytes:
    """Answers `Api_method` with encoded arguments. Raises UnknownApi, and ValueError for arguments of another shape."""
    api, _, method = name.partition("_")
    if api == "Metadata":
        return _metadata(state, method, data)
    function = _METHODS.get((api, method))
    if function is None:
        raise UnknownApi(name)
    shape = state.runtime.apis[api][method]
    values = tuple(state.runtime.decode("(" + ", ".join(kind for _, kind in shape["inputs"]) + ")", data))
    return state.runtime.encode(shape["output"], function(state, config, *values))


def _metadata(state: Reader, method: str, data: bytes) -> bytes:
    opaque = compact(len(state.runtime.metadata)) + state.runtime.metadata
    if method == "metadata_at_version":
        known = len(data) == 4 and int.from_bytes(data, "little") == _METADATA_V15
        return b"\x01" + opaque if known else b"\x00"
    if method == "metadata_versions":
        return compact(1) + _METADATA_V15.to_bytes(4, "little")
    raise UnknownApi(f"Metadata_{method}")


def _stake_info(state: Reader, hotkey: str, coldkey: str, netuid: int) -> dict[str, Any]:
    uid = subnets.uid_of(state, netuid, hotkey)
    size = subnets.num_uids(state, netuid)
    return {
        "hotkey": hotkey,
        "coldkey": coldkey,
        "netuid": netuid,
        "stake": stakes.stake_of(state, hotkey, coldkey, netuid),
        "locked": 0,
        "emission": 0 if uid is None else subnets.vector(state, "Emission", netuid, size)[uid],
        "tao_emission": 0,
        "drain": 0,
        "is_registered": uid is not None,
    }


def _stakes_of(state: Reader, coldkey: str) -> list[dict[str, Any]]:
    """All that a coldkey holds anywhere."""
    found = [
        _stake_info(state, hotkey, coldkey, netuid)
        for hotkey in state.get("StakingHotkeys", coldkey)
        for netuid in subnets.netuids(state)
    ]
    return [info for info in found if info["stake"]]


def _availability(state: Reader, coldkeys: list[str], netuids: list[int] | None) -> dict[str, dict[int, Any]]:
    wanted = subnets.netuids(state) if netuids is None else netuids
    found = {}
    for coldkey in coldkeys:
        held = dict.fromkeys(wanted, 0)
        for info in _stakes_of(state, coldkey):
            if info["netuid"] in held:
                held[info["netuid"]] += info["stake"]
        found[coldkey] = {
            netuid: {"total": alpha, "locked": 0, "available": alpha} for netuid, alpha in sorted(held.items())
        }
    return found


def _swap(amount: int) -> dict[str, int]:
    return {
        "tao_amount": amount,
        "alpha_amount": amount,
        "tao_fee": 0,
        "alpha_fee": 0,
        "tao_slippage": 0,
        "alpha_slippage": 0,
    }


def _delegate(state: Reader, hotkey: str) -> dict[str, Any] | None:
    owner = subnets.coldkey_of(state, hotkey)
    if owner is None:
        return None
    member_of = sorted(params[1] for params, member in state.items("IsNetworkMember", hotkey) if member)
    holders: dict[str, list[tuple[int, int]]] = {}
    for (_, coldkey, netuid), _shares in state.items("Alpha", hotkey):
        holders.setdefault(coldkey, []).append((netuid, stakes.stake_of(state, hotkey, coldkey, netuid)))
    permitted = []
    for netuid in member_of:
        uid = subnets.uid_of(state, netuid, hotkey)
        permits = subnets.vector(state, "ValidatorPermit", netuid, subnets.num_uids(state, netuid))
        if uid is not None and permits[uid]:
            permitted.append(netuid)
    return {
        "delegate_ss58": hotkey,
        "take": state.get("Delegates", hotkey),
        "nominators": sorted(holders.items()),
        "owner_ss58": owner,
        "registrations": member_of,
        "validator_permits": permitted,
        "return_per_1000": 0,
        "total_daily_return": 0,
    }


def _delegates(state: Reader) -> list[dict[str, Any]]:
    found = (_delegate(state, params[0]) for params, _ in state.items("Delegates"))
    return [delegate for delegate in found if delegate is not None]


def _delegated(state: Reader, coldkey: str) -> list[tuple[Any, Any]]:
    return [(_delegate(state, info["hotkey"]), (info["netuid"], info["stake"])) for info in _stakes_of(state, coldkey)]


def _neurons(state: Reader, netuid: int, *, lite: bool) -> list[dict[str, Any] | None]:
    return [neuron(state, netuid, uid, lite=lite) for uid in range(subnets.num_uids(state, netuid))]


def _earned_none(*_: object) -> list[object]:
    """What has to do with the root's baskets, which this chain doesn't have."""
    return []


Method = Callable[..., object]

_NEURON, _SUBNET, _STAKE = "NeuronInfoRuntimeApi", "SubnetInfoRuntimeApi", "StakeInfoRuntimeApi"
_SWAP, _BASKET, _DELEGATE = "SwapRuntimeApi", "BetaBasketRuntimeApi", "DelegateInfoRuntimeApi"

_METHODS: dict[tuple[str, str], Method] = {
    ("AccountNonceApi", "account_nonce"): lambda s, c, who: accounts.nonce_of(s, who),
    ("TransactionPaymentApi", "query_info"): lambda s, c, *_: {
        "weight": _NO_WEIGHT,
        "class": "Normal",
        "partial_fee": 0,
    },
    ("TransactionPaymentApi", "query_fee_details"): lambda s, c, *_: {"inclusion_fee": None, "tip": 0},
    (_NEURON, "get_neurons"): lambda s, c, netuid: _neurons(s, netuid, lite=False),
    (_NEURON, "get_neurons_lite"): lambda s, c, netuid: _neurons(s, netuid, lite=True),
    (_NEURON, "get_neuron"): lambda s, c, netuid, uid: neuron(s, netuid, uid, lite=False),
    (_NEURON, "get_neuron_lite"): lambda s, c, netuid, uid: neuron(s, netuid, uid, lite=True),
    (_SUBNET, "get_metagraph"): lambda s, c, netuid: metagraph(s, netuid),
    (_SUBNET, "get_mechagraph"): lambda s, c, netuid, mechanism: metagraph(s, netuid, mechanism),
    (_SUBNET, "get_all_metagraphs"): lambda s, c: [metagraph(s, netuid) for netuid in subnets.netuids(s)],
    (_SUBNET, "get_subnet_hyperparams_v3"): lambda s, c, netuid: hyperparameters(s, netuid),
    (_SUBNET, "get_next_epoch_start_block"): lambda s, c, netuid: subnets.next_epoch(s, netuid),
    (_SUBNET, "get_subnet_to_prune"): lambda s, c: None,
    (_SUBNET, "get_block_emission"): lambda s, c: 0,
    (_SUBNET, "get_coldkey_auto_stake_hotkey"): lambda s, c, *_: None,
    ("SubnetRegistrationRuntimeApi", "get_network_registration_cost"): lambda s, c: c.subnet_cost_rao,
    (_STAKE, "get_stake_info_for_coldkey"): lambda s, c, coldkey: _stakes_of(s, coldkey),
    (_STAKE, "get_stake_info_for_coldkeys"): lambda s, c, coldkeys: [(key, _stakes_of(s, key)) for key in coldkeys],
    (_STAKE, "get_stake_info_for_hotkey_coldkey_netuid"): lambda s, c, hotkey, coldkey, netuid: _stake_info(
        s, hotkey, coldkey, netuid
    ),
    (_STAKE, "get_stake_availability_for_coldkeys"): lambda s, c, coldkeys, netuids: _availability(
        s, coldkeys, netuids
    ),
    (_STAKE, "get_stake_fee"): lambda s, c, *_: 0,
    (_STAKE, "get_coldkey_lock"): lambda s, c, *_: None,
    (_STAKE, "get_hotkey_conviction"): lambda s, c, *_: {"bits": 0},
    (_STAKE, "get_most_convicted_hotkey_on_subnet"): lambda s, c, *_: None,
    (_SWAP, "current_alpha_price"): lambda s, c, *_: RAO,
    (_SWAP, "current_alpha_price_all"): lambda s, c: [{"netuid": n, "price": RAO} for n in subnets.netuids(s)],
    (_SWAP, "sim_swap_tao_for_alpha"): lambda s, c, netuid, tao: _swap(tao),
    (_SWAP, "sim_swap_alpha_for_tao"): lambda s, c, netuid, alpha: _swap(alpha),
    (_DELEGATE, "get_delegates"): lambda s, c: _delegates(s),
    (_DELEGATE, "get_delegate"): lambda s, c, hotkey: _delegate(s, hotkey),
    (_DELEGATE, "get_delegated"): lambda s, c, coldkey: _delegated(s, coldkey),
    (_BASKET, "get_root_basket_owed"): lambda s, c, *_: 0,
    (_BASKET, "get_basket_payout"): lambda s, c, *_: 0,
    (_BASKET, "get_validator_basket_nav"): lambda s, c, *_: 0,
    (_BASKET, "get_root_basket_total_nav"): lambda s, c, *_: 0,
    (_BASKET, "get_validator_basket"): _earned_none,
    (_BASKET, "get_all_validator_baskets"): _earned_none,
    (_BASKET, "get_root_basket_positions"): _earned_none,
    (_BASKET, "get_root_basket_portfolio"): _earned_none,
    (_BASKET, "get_beta_portfolio"): _earned_none,
    (_BASKET, "get_beta_pricing"): lambda s, c, *_: None,
    (_BASKET, "get_all_beta_pricing"): lambda s, c, *_: {"pricing": [], "next": None},
}
"""(API, method) to what answers it: state, config, then the arguments."""
