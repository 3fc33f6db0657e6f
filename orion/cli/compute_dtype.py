"""What a device computes in, as a choice on the command line."""

from enum import StrEnum


class ComputeDtype(StrEnum):
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"

    @property
    def value_bytes(self) -> int:
        return 2 if self is ComputeDtype.BFLOAT16 else 4
