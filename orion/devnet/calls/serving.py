"""Announcing where a neuron can be reached."""

from orion.devnet import subnets
from orion.devnet.dispatch import Execution, Handler, Origin, require
from orion.devnet.state import Reader

_IPV4, _IPV6 = 4, 6
_LOOPBACK_V4 = 0x7F00_0001
_BROADCAST_V4 = 0xFFFF_FFFF
_LOOPBACK_V6 = 1
_U128_MAX = (1 << 128) - 1


def serve_axon(
    execution: Execution,
    origin: Origin,
    *,
    netuid: int,
    version: int,
    ip: int,
    port: int,
    ip_type: int,
    protocol: int,
    placeholder1: int,
    placeholder2: int,
) -> None:
    """Sets the signer's axon; the address 0 withdraws it."""
    hotkey = origin.signed()
    state = execution.state
    _check_endpoint(state, netuid, hotkey, ip, ip_type)
    before = state.get("Axons", netuid, hotkey)
    _check_rate(execution, netuid, 0 if before is None else int(before["block"]))
    require(port != 0, "InvalidPort")
    axon = {
        "block": execution.block,
        "version": version,
        "ip": ip,
        "port": port,
        "ip_type": ip_type,
        "protocol": protocol,
        "placeholder1": placeholder1,
        "placeholder2": placeholder2,
    }
    state.put("Axons", netuid, hotkey, value=axon)
    execution.emit("AxonServed", netuid, hotkey)


def serve_prometheus(
    execution: Execution, origin: Origin, *, netuid: int, version: int, ip: int, port: int, ip_type: int
) -> None:
    """Sets where the signer's metrics are."""
    hotkey = origin.signed()
    state = execution.state
    _check_endpoint(state, netuid, hotkey, ip, ip_type)
    before = state.get("Prometheus", netuid, hotkey)
    _check_rate(execution, netuid, 0 if before is None else int(before["block"]))
    require(port != 0, "InvalidPort")
    endpoint = {"block": execution.block, "version": version, "ip": ip, "port": port, "ip_type": ip_type}
    state.put("Prometheus", netuid, hotkey, value=endpoint)
    execution.emit("PrometheusServed", netuid, hotkey)


def is_valid_address(ip: int, ip_type: int) -> bool:
    """The real chain's rule: no loopback, no broadcast; 0 means that nothing is served."""
    if ip_type == _IPV4:
        return ip < _BROADCAST_V4 and ip != _LOOPBACK_V4
    return ip not in {_LOOPBACK_V6, _U128_MAX}


def _check_endpoint(state: Reader, netuid: int, hotkey: str, ip: int, ip_type: int) -> None:
    require(subnets.uid_of(state, netuid, hotkey) is not None, "HotKeyNotRegisteredInNetwork")
    require(ip_type in {_IPV4, _IPV6}, "InvalidIpType")
    require(is_valid_address(ip, ip_type), "InvalidIpAddress")


def _check_rate(execution: Execution, netuid: int, last_block: int) -> None:
    limit = int(execution.state.get("ServingRateLimit", netuid))
    require(last_block == 0 or execution.block - last_block >= limit, "ServingRateLimitExceeded")


CALLS: dict[tuple[str, str], Handler] = {
    ("SubtensorModule", "serve_axon"): serve_axon,
    ("SubtensorModule", "serve_prometheus"): serve_prometheus,
}
