"""Rules of routing raced through one simulated world: `orion bench routing`."""
