"""How a journal's tables came to be what they are, step by step; `orion.orchestrator.migrate` applies them."""
