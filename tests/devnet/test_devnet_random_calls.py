"""Random calls with random arguments, signed by whom they may: none stops the chain or makes TAO out of nothing."""

import random
import re
from typing import Any

import pytest
from chain_kit import Lab, address

from orion.devnet.calls.table import CALLS
from orion.devnet.extrinsics import InvalidTransaction

CALLS_EACH = 250
ADDRESSES = [address(uri) for uri in ("//Alice", "//Bob", "//Alice//hotkey", "//Bob//hotkey", "//Nobody")]


def _bits(kind: str) -> int:
    found = re.search(r"\d+", kind) if kind[0] in "ui" else None
    return int(found.group()) if found else {"NetUid": 16, "PerU16": 16, "MechId": 8}.get(kind, 64)


def _value(rng: random.Random, kind: str, name: str) -> Any:
    """Something of the type, often at an end of its range."""
    if name.endswith("netuid"):
        return rng.choice([0, 1, 1, 1, 2, 65_535])
    if kind in {"AccountId32", "MultiAddress"}:
        return rng.choice(ADDRESSES)
    if kind == "bool":
        return rng.random() < 0.5
    if kind == "Vec<u16>":
        return [rng.choice([0, 1, 2, 65_535]) for _ in range(rng.randrange(4))]
    if kind in {"Vec<u8>", "BoundedVec"}:
        return rng.randbytes(rng.randrange(60))
    if kind == "FixedU128":
        return {"bits": rng.choice([0, 1 << 64, (1 << 128) - 1])}
    if kind.startswith("Option"):
        return None
    top = (1 << (_bits(kind) - 1)) - 1
    return rng.choice([0, 1, 2, 5, 10**9, 10**10, top if kind[0] == "i" else 2 * top + 1]) & (2 * top + 1)


@pytest.mark.parametrize("seed", [1, 2])
def test_no_call_stops_the_chain_or_makes_tao(seed: int) -> None:
    rng, lab = random.Random(seed), Lab()
    lab.subnet("//Bob", "//Charlie")
    lab.stake("//Alice", 1, 100)
    shapes = {
        (pallet["name"], call["name"]): call["args"]
        for pallet in lab._sdk_runtime.metadata_ir()["pallets"]
        for call in pallet["calls"]
    }
    outcomes = set()
    for _ in range(CALLS_EACH):
        pallet, function = rng.choice(sorted(CALLS))
        args = {each["name"]: _value(rng, each["type_ident"], each["name"]) for each in shapes[pallet, function]}
        try:
            call = lab.call(pallet, function, **args)
        except (ValueError, OverflowError):
            continue  # a value out of the type's range: such a call can't be sent
        signer = rng.choice(["//Alice", "//Bob", "//Alice//hotkey", "//Bob//hotkey"])
        if rng.random() < 0.4:
            signer, call = "//Alice", lab.call("Sudo", "sudo", call=call)
        try:
            lab.chain.submit(lab.extrinsic(signer, call))
        except InvalidTransaction:
            continue
        lab.blocks(rng.choice([1, 1, 3]))
        outcomes.update(lab.outcomes())
        free = sum(account["data"]["free"] for _, account in lab.chain.state.items("System.Account"))
        held = sum(rao for _, rao in lab.chain.state.items("SubnetTAO"))
        assert lab.get("TotalIssuance") == free + held, (pallet, function, args)
    assert len(outcomes) > 10, f"only {outcomes} came of it"
