"""Carrying an extrinsic that is sealed for the block's author."""

from orion.devnet.blocks import digest
from orion.devnet.dispatch import Execution, Handler, Origin, argument_bytes


def submit_encrypted(execution: Execution, origin: Origin, *, ciphertext: str) -> None:
    """Hands what is sealed to the chain, which applies it behind this extrinsic when it is good."""
    who = origin.signed()
    sealed = argument_bytes(ciphertext)
    execution.sealed.append(sealed)
    execution.emit("EncryptedSubmitted", pallet="MevShield", id="0x" + digest(sealed).hex(), who=who)


CALLS: dict[tuple[str, str], Handler] = {("MevShield", "submit_encrypted"): submit_encrypted}
