"""Which documents are held out and never trained on.

Pure. The choice falls on a document's text alone, so that no copy of a held-out document is trained on either.
"""

from enum import StrEnum

from blake3 import blake3

_IDENTITY_BYTES = 16


class Side(StrEnum):
    """Where a document goes."""

    TRAIN = "train"
    HELDOUT = "heldout"
    NEITHER = "neither"
    """A further copy of a held-out document."""


def is_heldout(document: str, fraction: float) -> bool:
    """Whether a document is of the kind that is held out while there is room; `fraction` of all documents are."""
    return _is_chosen(_identity(document), fraction)


class HeldoutSplit:
    """Chooses documents one by one until `tokens_max` tokens are held out; later ones of that kind are trained on.

    Remembers 16 bytes per held-out document, so its memory is bounded by `tokens_max`.
    """

    def __init__(self, fraction: float, tokens_max: int) -> None:
        self._fraction = fraction
        self._room_tokens = tokens_max
        self._heldout: set[bytes] = set()

    def choose(self, document: str, num_tokens: int) -> Side:
        """Side of the next document, which is `num_tokens` long."""
        identity = _identity(document)
        if identity in self._heldout:
            return Side.NEITHER
        if num_tokens > self._room_tokens or not _is_chosen(identity, self._fraction):
            return Side.TRAIN
        self._heldout.add(identity)
        self._room_tokens -= num_tokens
        return Side.HELDOUT


def _identity(document: str) -> bytes:
    return blake3(document.encode("utf-8")).digest(length=_IDENTITY_BYTES)


def _is_chosen(identity: bytes, fraction: float) -> bool:
    return int.from_bytes(identity[:8], "little") < fraction * 2**64
