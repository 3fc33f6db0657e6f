"""Emulated links between processes on one machine: a network namespace for each peer, its rates limited by the kernel
(`tbf`). Where that is all, a bridge of the kernel's joins them; else a switch in user space adds what the kernel here
may lack: delay, jitter, stalls. Either can cut a link, also one way only. Whatever talks TCP goes
through unchanged, so every system that is compared meets the same network.

`profile` says what a link is like, `namespaces` makes the peers' ends, `bridge` and `switch` join them, `shaping`
decides when a frame arrives (pure), `host` is the process that owns it all, `network` is what benchmarks and tests use.
"""
