"""The lines by which an emulated network's owner talks with the process that is the network.

Commands come as JSON lines on standard input, `{"cut": PEER, "way": WAY}` and `{"heal": PEER}`; each is answered with a
line once it was followed. No more can come once standard input has closed: whoever started this is gone.
"""

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

from orion.bench.links.profile import Way


class Commands:
    """What comes in on standard input; can be waited for with `select`."""

    def __init__(self) -> None:
        self._received = b""

    def fileno(self) -> int:
        """Of standard input."""
        return 0

    def follow(self, cut: Callable[[int, Way], None], heal: Callable[[int], None]) -> bool:
        """Reads once, and follows what has come in whole; whether more may come."""
        received = os.read(0, 65_536)
        *lines, self._received = (self._received + received).split(b"\n")
        for line in lines:
            command = json.loads(line)
            if "cut" in command:
                cut(command["cut"], Way(command["way"]))
            else:
                heal(command["heal"])
            say({"done": command})
        return bool(received)


def say(line: dict[str, Any]) -> None:
    """Answers."""
    # Whoever started this may be gone.
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(line).encode() + b"\n")
