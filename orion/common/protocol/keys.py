"""Names of the objects in the store. Pure; the only place that spells them."""

from orion.common.ids import Hotkey


def pseudo_gradient_key(outer_step: int, stage_index: int, hotkey: Hotkey, partition_index: int) -> str:
    """A contributor's encoded slice of its pseudo-gradient."""
    return f"outer/{outer_step}/stage/{stage_index}/pseudo-gradient/{hotkey}/{partition_index}.safetensors"


def reduced_key(outer_step: int, stage_index: int, hotkey: Hotkey, partition_index: int) -> str:
    """A reducer's mean of one partition (fp32)."""
    return f"outer/{outer_step}/stage/{stage_index}/reduced/{hotkey}/{partition_index}.safetensors"


def checkpoint_key(outer_step: int, stage_index: int, hotkey: Hotkey) -> str:
    """A stage's whole anchor and outer momentum at the start of `outer_step`."""
    return f"outer/{outer_step}/stage/{stage_index}/checkpoint/{hotkey}.safetensors"


def outer_step_prefix(outer_step: int) -> str:
    """All objects of one outer step; they are deleted together."""
    return f"outer/{outer_step}/"


def owner_of(key: str) -> str | None:
    """The hotkey that may write this key, None if nobody may."""
    parts = key.split("/")
    if len(parts) < 6 or parts[0] != "outer" or parts[2] != "stage":
        return None
    if parts[4] in ("pseudo-gradient", "reduced") and len(parts) == 7:
        return parts[5]
    if parts[4] == "checkpoint" and len(parts) == 6:
        return parts[5].removesuffix(".safetensors")
    return None
