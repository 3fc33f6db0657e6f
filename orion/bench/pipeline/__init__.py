"""`orion bench pipeline`: one tiny Llama trained by one process, by torch.distributed.pipelining and by Orion, over the
same links.

`plan` says what is measured, `window` what follows from the times of inner steps, `plain`, `torch_stage` and
`orion_roles` are the processes that train, `drive` runs them, `table` puts the figures together.
"""
