"""What an outer step's synchronisation costs: replicas of one stage with made-up parameters, each a real miner process,
a real orchestrator with its store, real HTTP over emulated links; beside gloo's all_reduce on the same links.

`plan` says what is measured and what the links allow at best (pure), `drive` runs it, `made_up_miner` is a miner whose
device does nothing, `gloo_peer` is what it is compared with.
"""
