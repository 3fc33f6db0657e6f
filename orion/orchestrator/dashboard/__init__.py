"""The run as people watch it: histories of what the core decided, a page made of them, and how browsers get it."""
