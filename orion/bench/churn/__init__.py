"""What miners that are killed, stopped or cut off again and again cost a run of real processes.

`plan` says who is struck and what follows from the figures (pure), `proxy` cuts a miner off, `miners` are the miners'
processes, `study` runs the swarm.
"""
