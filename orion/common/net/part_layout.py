"""How an object is cut into parts. Pure."""

from orion.common.protocol.fields import OBJECT_PARTS_MAX

PART_BYTES = 16 * 1024 * 1024
"""At 100 Mbit/s a part takes 1.3 s: long beside a round trip, short beside what a lost one costs. S3 wants 5 MiB."""
_ROUND_BYTES = 1024 * 1024


def part_size(size_bytes: int, part_bytes: int = PART_BYTES) -> int:
    """Size of each part but the last of an object: `part_bytes`, or more where there would be too many parts."""
    if part_bytes * OBJECT_PARTS_MAX >= size_bytes:
        return part_bytes
    return -(-size_bytes // (OBJECT_PARTS_MAX * _ROUND_BYTES)) * _ROUND_BYTES


def part_ranges(size_bytes: int, part_bytes: int) -> list[range]:
    """Which bytes each part holds, in order; they cover the object exactly once. An empty object has one empty part.

    Raises ValueError when there are more parts than an object may have.
    """
    if part_bytes <= 0 or size_bytes > part_bytes * OBJECT_PARTS_MAX:
        raise ValueError(f"{size_bytes} bytes in parts of {part_bytes} are more than {OBJECT_PARTS_MAX} parts")
    starts = range(0, max(size_bytes, 1), part_bytes)
    return [range(start, min(start + part_bytes, size_bytes)) for start in starts]
