"""JSON-RPC: the methods that answer at once, and how errors are said.

Owns the parsing of parameters and the shape of answers. Must not wait or know connections: subscriptions are the
server's. Every failure is an `RpcError`; its codes and texts are the real node's where the SDK reads them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from orion.devnet.blocks import Block
from orion.devnet.chain import DevChain
from orion.devnet.extrinsics import InvalidTransaction
from orion.devnet.metadata import SPEC_VERSION, SS58_FORMAT, TRANSACTION_VERSION
from orion.devnet.pool import PoolRefusal
from orion.devnet.runtime_api import UnknownApi, call_runtime_api

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL_ERROR = -32700, -32600, -32601, -32602, -32603
INVALID_TRANSACTION = 1010
UNKNOWN_BLOCK = 4003
"""Also an API that the runtime doesn't export."""

KEYS_PAGE_MAX = 1000
QUERY_KEYS_MAX = 100_000


class RpcError(Exception):
    """A request that fails."""

    def __init__(self, code: int, message: str, data: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.data = data

    def as_json(self) -> dict[str, object]:
        error: dict[str, object] = {"code": self.code, "message": str(self)}
        return error if self.data is None else {**error, "data": self.data}


def answer(chain: DevChain, method: str, params: Sequence[Any]) -> object:
    """Answers a request. Raises RpcError."""
    function = METHODS.get(method)
    if function is None:
        raise RpcError(METHOD_NOT_FOUND, f"Method not found: {method}")
    try:
        return function(chain, *params)
    except RpcError:
        raise
    except LookupError as error:
        raise RpcError(UNKNOWN_BLOCK, f"Client error: UnknownBlock: {error}") from error
    except UnknownApi as error:
        raise RpcError(UNKNOWN_BLOCK, f"Client error: {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise RpcError(INVALID_PARAMS, f"Invalid params for {method}: {error}") from error


def submit(chain: DevChain, extrinsic: str) -> bytes:
    """Takes an extrinsic in hexadecimal; returns its hash. Raises RpcError."""
    try:
        return chain.submit(_bytes(extrinsic)).hash
    except InvalidTransaction as error:
        raise RpcError(INVALID_TRANSACTION, "Invalid Transaction", str(error)) from error
    except PoolRefusal as refusal:
        raise RpcError(refusal.code, str(refusal)) from refusal


def hexadecimal(data: bytes | None) -> str | None:
    return None if data is None else "0x" + data.hex()


def _bytes(text: object) -> bytes:
    """Of hexadecimal text. The SDK leaves out the 0x in front of a call's data."""
    if not isinstance(text, str):
        raise RpcError(INVALID_PARAMS, f"Invalid params: {str(text)[:80]!r} is not hexadecimal text")
    try:
        return bytes.fromhex(text.removeprefix("0x"))
    except ValueError as error:
        raise RpcError(INVALID_PARAMS, f"Invalid params: {error}") from error


def _hash(text: object) -> bytes | None:
    return None if text is None else _bytes(text)


def _block(chain: DevChain, at: object) -> Block | None:
    block_hash = _hash(at)
    return chain.head if block_hash is None else chain.blocks.by_hash(block_hash)


def _block_hash(chain: DevChain, number: object = None) -> object:
    """Of one number, of each in a list, or of the newest block."""
    if isinstance(number, list):
        return [_one_block_hash(chain, each) for each in number[:KEYS_PAGE_MAX]]
    return hexadecimal(chain.blocks.head_hash) if number is None else _one_block_hash(chain, number)


def _one_block_hash(chain: DevChain, number: object) -> object:
    wanted = int(number, 16) if isinstance(number, str) else number
    if not isinstance(wanted, int):
        raise RpcError(INVALID_PARAMS, f"Invalid params: {number!r} is not a block number")
    return hexadecimal(chain.blocks.hash_of(wanted))


def _head(chain: DevChain) -> object:
    return hexadecimal(chain.blocks.head_hash)


def _header(chain: DevChain, at: object = None) -> object:
    block = _block(chain, at)
    return None if block is None else block.header()


def _whole_block(chain: DevChain, at: object = None) -> object:
    block = _block(chain, at)
    if block is None:
        return None
    extrinsics = ["0x" + extrinsic.hex() for extrinsic in block.extrinsics]
    return {"block": {"header": block.header(), "extrinsics": extrinsics}, "justifications": None}


def _storage(chain: DevChain, key: object, at: object = None) -> object:
    return hexadecimal(chain.reader(_hash(at)).source.raw(_bytes(key)))


def _query_storage(chain: DevChain, keys: list[object], at: object = None) -> object:
    if len(keys) > QUERY_KEYS_MAX:
        raise RpcError(INVALID_PARAMS, f"Invalid params: {len(keys)} keys; at most {QUERY_KEYS_MAX} at once")
    source = chain.reader(_hash(at)).source
    block_hash = at or hexadecimal(chain.blocks.head_hash)
    return [{"block": block_hash, "changes": [[key, hexadecimal(source.raw(_bytes(key)))] for key in keys]}]


def _keys_paged(chain: DevChain, prefix: object, count: int, start: object = None, at: object = None) -> object:
    after = _bytes(start) if start is not None else b""
    keys = [key for key in chain.reader(_hash(at)).source.keys(_bytes(prefix)) if key > after]
    return [hexadecimal(key) for key in keys[: min(int(count), KEYS_PAGE_MAX)]]


def _state_call(chain: DevChain, name: str, data: object, at: object = None) -> object:
    return hexadecimal(call_runtime_api(chain.reader(_hash(at)), chain.config, name, _bytes(data)))


def _runtime_version(chain: DevChain, at: object = None) -> object:
    return {
        "specName": "node-subtensor",
        "implName": "orion-devnet",
        "authoringVersion": 1,
        "specVersion": SPEC_VERSION,
        "implVersion": 1,
        "apis": [],
        "transactionVersion": TRANSACTION_VERSION,
        "stateVersion": 1,
    }


def _metadata(chain: DevChain, at: object = None) -> object:
    return hexadecimal(chain.runtime.metadata)


def _properties(chain: DevChain) -> object:
    return {"ss58Format": SS58_FORMAT, "tokenDecimals": 9, "tokenSymbol": "TAO"}


def _health(chain: DevChain) -> object:
    return {"peers": 0, "isSyncing": False, "shouldHavePeers": False}


Method = Callable[..., object]

METHODS: dict[str, Method] = {
    "account_nextIndex": lambda chain, address: chain.next_nonce(address),
    "system_accountNextIndex": lambda chain, address: chain.next_nonce(address),
    "author_submitExtrinsic": lambda chain, extrinsic: hexadecimal(submit(chain, extrinsic)),
    "author_pendingExtrinsics": lambda chain: ["0x" + waiting.raw.hex() for waiting in chain.pool.waiting()],
    "chain_getBlock": _whole_block,
    "chain_getBlockHash": _block_hash,
    "chain_getFinalizedHead": _head,
    "chain_getHead": _head,
    "chain_getHeader": _header,
    "rpc_methods": lambda chain: {"methods": sorted(METHODS)},
    "state_call": _state_call,
    "state_getKeysPaged": _keys_paged,
    "state_getMetadata": _metadata,
    "state_getRuntimeVersion": _runtime_version,
    "state_getStorage": _storage,
    "state_getStorageAt": _storage,
    "state_queryStorageAt": _query_storage,
    "system_chain": lambda chain: "Orion development chain",
    "system_chainType": lambda chain: "Development",
    "system_health": _health,
    "system_name": lambda chain: "orion-devnet",
    "system_properties": _properties,
    "system_version": lambda chain: "1",
}
"""Method to what answers it: the chain, then the parameters."""
