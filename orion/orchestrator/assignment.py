"""Which stage a newcomer gets. Pure."""

from collections.abc import Sequence


def choose_stage(supply: Sequence[int], replicas: int, wish: int | None) -> int:
    """The wished stage while it has fewer miners than `replicas`, else the least supplied one, the first of equals.

    `supply` counts each stage's present miners. A wish for a stage that does not exist is no wish.
    """
    if wish is not None and wish < len(supply) and supply[wish] < replicas:
        return wish
    return min(range(len(supply)), key=lambda stage_index: (supply[stage_index], stage_index))
