"""The runtime's metadata: loads the real one, makes two small changes to it, and encodes and decodes with it.

Everything on the wire follows from these bytes: storage keys, calls, events, error numbers, runtime APIs, signature
payloads. The file is the real metadata of spec 461, unchanged (`data/SOURCE.md`). Changed in memory, and why:

- `SubtensorModule.SubnetEpochConsensus` is added. The SDK 11.3 reads it before it sets weights; spec 461 doesn't have
  it yet. Its value is 0 (Yuma) everywhere.
- `Aura.SlotDuration` says this chain's own block time, which the SDK computes waiting times from.

Must not hold state of the chain.
"""

import lzma
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import bittensor_core

SPEC_VERSION = 461
TRANSACTION_VERSION = 1
SS58_FORMAT = 42

PALLET = "SubtensorModule"
"""The pallet of an item that is named without one."""

_RECORDED_BLOCK_MS = 250
"""Of the node that the metadata is from."""

_FILE = "subtensor-461-v15.scale.xz"


def compact(number: int) -> bytes:
    """SCALE's compact encoding of a length below 2^30."""
    if number < 1 << 6:
        return bytes([number << 2])
    if number < 1 << 14:
        return ((number << 2) | 1).to_bytes(2, "little")
    assert number < 1 << 30, "no length here is that long"
    return ((number << 2) | 2).to_bytes(4, "little")


def read_compact(data: bytes, offset: int) -> tuple[int, int]:
    """(number, offset behind it). Raises ValueError where the data ends before the number does."""
    size = (1, 2, 4, 0)[data[offset] & 3] if offset < len(data) else 0
    if size == 0 or offset + size > len(data):
        raise ValueError(f"no compact number of at most four bytes at offset {offset}")
    return int.from_bytes(data[offset : offset + size], "little") >> 2, offset + size


def _text(text: str) -> bytes:
    return compact(len(text)) + text.encode()


def add_storage_like(metadata: bytes, pallet: str, like: str, name: str) -> bytes:
    """Metadata with one more map in `pallet`: a copy of `like` under another name, its default all zero bytes."""
    # A pallet is: its name, Option<storage: prefix, entries>; an entry: name, modifier, type, default, documentation.
    head = _text(pallet) + b"\x01" + _text(pallet)
    start = metadata.index(head) + len(head)
    num_entries, first = read_compact(metadata, start)
    source = metadata.index(_text(like) + b"\x01\x01", first)
    shape = source + len(_text(like))
    offset = shape + 2
    num_hashers, offset = read_compact(metadata, offset)
    offset += num_hashers
    _, offset = read_compact(metadata, offset)
    _, default = read_compact(metadata, offset)
    size, _ = read_compact(metadata, default)
    entry = _text(name) + metadata[shape:default] + compact(size) + bytes(size) + compact(0)
    return metadata[:start] + compact(num_entries + 1) + entry + metadata[first:]


def set_constant(metadata: bytes, name: str, old: bytes, new: bytes) -> bytes:
    """Metadata with another value of a constant, as long as the old one."""
    assert len(old) == len(new), "lengths stand in the metadata too"
    # A constant is: its name, its type's number in compact form, its value with the length in front.
    places = list(re.finditer(re.escape(_text(name)) + b".{1,4}?" + re.escape(compact(len(old)) + old), metadata, re.S))
    assert len(places) == 1, f"{name} must occur once with this value"
    end = places[0].end()
    return metadata[: end - len(old)] + new + metadata[end:]


@cache
def real_metadata() -> bytes:
    """The V15 metadata as the real chain sends it."""
    return lzma.decompress(files("orion.devnet").joinpath("data", _FILE).read_bytes())


def development_metadata(block_ms: int) -> bytes:
    """The metadata that this chain sends."""
    metadata = add_storage_like(real_metadata(), PALLET, "Tempo", "SubnetEpochConsensus")
    return set_constant(
        metadata, "SlotDuration", _RECORDED_BLOCK_MS.to_bytes(8, "little"), block_ms.to_bytes(8, "little")
    )


@dataclass(frozen=True)
class Item:
    """One storage item: where it is and how its value is encoded."""

    pallet: str
    name: str
    value_type: str
    num_params: int
    default: bytes | None
    """Encoded value of a key that was never set; None where such a key has no value."""


class Runtime:
    """The codec: everything that the metadata determines. One a chain, no state besides caches."""

    def __init__(self, metadata: bytes) -> None:
        self.metadata = metadata
        self._core = bittensor_core.Runtime(metadata, SPEC_VERSION, TRANSACTION_VERSION, SS58_FORMAT)
        self._items: dict[str, Item] = {}
        self._errors = {
            (pallet["name"], error["name"]): (int(pallet["index"]), int(error["index"]))
            for pallet in self._core.metadata_ir()["pallets"]
            for error in pallet["errors"]
        }
        self.apis: dict[str, dict[str, Any]] = self._core.runtime_api_map()
        """API to method to its `inputs` (name and type) and `output` type."""

    def item(self, name: str) -> Item:
        """The storage item `Pallet.Name`, or `Name` of the main pallet. Raises KeyError."""
        found = self._items.get(name)
        if found is None:
            pallet, _, item = name.rpartition(".")
            entry = self._core.storage_entry(pallet or PALLET, item)
            found = Item(
                pallet=pallet or PALLET,
                name=item,
                value_type=entry.value_type,
                num_params=len(entry.param_types),
                default=bytes(entry.default_bytes) if entry.modifier == "Default" else None,
            )
            self._items[name] = found
        return found

    def storage_key(self, name: str, *params: object) -> bytes:
        """The key of an item; with fewer parameters than it has, the prefix of all keys that begin with them."""
        item = self.item(name)
        return bytes(self._core.storage_key(item.pallet, item.name, list(params)))

    def key_params(self, name: str, key: bytes) -> tuple[Any, ...]:
        """The parameters in a whole storage key."""
        item = self.item(name)
        return tuple(self._core.decode_storage_key_params(item.pallet, item.name, key, 0))

    def encode(self, type_name: str, value: object) -> bytes:
        return bytes(self._core.encode(type_name, value))

    def decode(self, type_name: str, data: bytes) -> Any:
        return self._core.decode(type_name, data)

    def compose_call(self, pallet: str, function: str, **args: object) -> bytes:
        return bytes(self._core.compose_call(pallet, function, args))

    def decode_extrinsic(self, data: bytes) -> dict[str, Any]:
        decoded: dict[str, Any] = self._core.decode_extrinsic(data)
        return decoded

    def signed_parts(self, era: object, nonce: int, tip: int, genesis: bytes, era_block: bytes) -> tuple[bytes, bytes]:
        """(what an extrinsic carries besides its call, what its signature covers besides both)."""
        carried, covered = self._core.signature_payload_parts(
            era=era, nonce=nonce, tip=tip, tip_asset_id=None, genesis_hash=genesis, era_block_hash=era_block
        )
        return bytes(carried), bytes(covered)

    def module_error(self, pallet: str, name: str) -> dict[str, object]:
        """The dispatch error that a pallet's own error is reported as."""
        pallet_index, error_index = self._errors[pallet, name]
        return {"Module": {"index": pallet_index, "error": bytes([error_index, 0, 0, 0])}}

    def constant(self, pallet: str, name: str) -> Any:
        return self._core.constant(pallet, name)
