"""Names of the objects in the store. Pure; the only place that spells them."""

import re
from dataclasses import dataclass
from typing import Literal

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


def start_key(outer_step: int, stage_index: int) -> str:
    """The checkpoint that the run goes on from; the orchestrator's own."""
    return f"outer/{outer_step}/stage/{stage_index}/start.safetensors"


def outer_step_prefix(outer_step: int) -> str:
    """All objects of one outer step; they are deleted together."""
    return f"outer/{outer_step}/"


def owner_of(key: str) -> str | None:
    """The hotkey that may write this key, None if nobody may."""
    name = parse_key(key)
    return name.hotkey if name is not None else None


@dataclass(frozen=True, slots=True)
class ObjectName:
    """What a key says about its object."""

    kind: Literal["pseudo-gradient", "reduced", "checkpoint", "start"]
    outer_step: int
    stage_index: int
    hotkey: Hotkey | None
    """None for the checkpoint that the run goes on from: no miner writes that."""
    partition_index: int | None
    """None for a checkpoint."""


_KEY = re.compile(
    r"outer/(?P<outer_step>0|[1-9][0-9]{0,9})/stage/(?P<stage_index>0|[1-9][0-9]{0,2})"
    r"/(?:(?P<kind>pseudo-gradient|reduced)/(?P<hotkey>[A-Za-z0-9]+)/(?P<partition_index>0|[1-9][0-9]{0,3})"
    r"|checkpoint/(?P<checkpoint_hotkey>[A-Za-z0-9]+)"
    r"|start)\.safetensors"
)


def parse_key(key: str) -> ObjectName | None:
    """The name behind a key, None when none of the functions above makes such keys."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    outer_step, stage_index = int(match["outer_step"]), int(match["stage_index"])
    if match["kind"] is None and match["checkpoint_hotkey"] is None:
        return ObjectName("start", outer_step, stage_index, None, None)
    if match["kind"] is None:
        return ObjectName("checkpoint", outer_step, stage_index, Hotkey(match["checkpoint_hotkey"]), None)
    kind: Literal["pseudo-gradient", "reduced"] = "reduced" if match["kind"] == "reduced" else "pseudo-gradient"
    return ObjectName(kind, outer_step, stage_index, Hotkey(match["hotkey"]), int(match["partition_index"]))
