"""The process that is the network: `python -m orion.bench.links.host PLAN` with the plan as JSON.

It makes the namespaces and joins them, by the kernel's bridge where that is enough and by the switch where it isn't;
prints a line once it is ready, follows commands, and tells what was moved when it ends: when standard input closes,
when it is told to (SIGTERM) or when its time is up. It takes its namespaces with it; so nothing is left behind when
whoever started it dies, however it dies.
"""

import os
import signal
import subprocess
import sys

from orion.bench.links.bridge import Bridge
from orion.bench.links.commands import Commands, say
from orion.bench.links.namespaces import Plan, remove_namespaces
from orion.bench.links.switch import Switch
from orion.common.clock import SystemClock

_PRIORITY = -10
"""A link doesn't get slower because the processors are busy: what moves frames goes first."""


def main() -> None:
    """Runs one network."""
    plan = Plan.parse(sys.argv[1])
    clock = SystemClock()
    try:
        joined = Switch(plan, clock) if plan.needs_switch else Bridge(plan, clock)
        signal.signal(signal.SIGTERM, lambda *_: joined.stop())
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for whoever started this
        os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)
        before = os.times()
        say({"ready": True})
        joined.run(plan.lifetime_s, Commands())
        after = os.times()
        say(
            {
                "num_delivered": joined.num_delivered,
                "num_dropped": joined.num_dropped,
                "cpu_s": (after.user + after.system) - (before.user + before.system),
            }
        )
    except subprocess.CalledProcessError as error:
        say({"error": f"{' '.join(error.cmd)}: {error.stderr.strip()}"})
        sys.exit(1)
    except OSError as error:
        say({"error": str(error)})
        sys.exit(1)
    finally:
        remove_namespaces([*plan.namespaces, plan.hub])


if __name__ == "__main__":
    main()
