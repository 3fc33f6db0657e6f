"""Emulated links between processes on one machine: a network namespace for each peer, its upload limited by the kernel
(`tbf`), and a switch in user space that adds what the kernel here may lack: delay, jitter, stalls, download limits,
cuts. Whatever talks TCP goes through it unchanged, so every system that is compared meets the same network.

`profile` says what a link is like, `shaping` decides when a frame arrives (pure), `switch` is the process that moves
frames, `network` is what benchmarks and tests use.
"""
