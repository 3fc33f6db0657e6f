"""What the calls do to the state: one module a subject, one function a call, named as the call.

A module's `CALLS` maps (pallet, call) to the function. Functions take the execution, the origin and the call's
arguments by name, check in the real chain's order, and raise DispatchError with the real names. `table.py` puts them
together.
"""
