"""The error types every part shares, by whose fault it is.

- ours: an assertion; the process ends.
- the user's: `ConfigError`, `DataError`; one clear line that says what to do.
- the transport's: `TransportError`; retried with a bound.
- a peer's: `RefusedError`; the typed refusal that a request was answered with.
"""


class OrionError(Exception):
    """Base of every error that Orion raises on purpose."""


class ConfigError(OrionError, ValueError):
    """A setting is unknown, out of range or at odds with another; the message says which and what to do."""


class DataError(OrionError):
    """Text, tokenizer or shards are missing or damaged; the message names the file and what to do."""


class TransportError(OrionError):
    """The other side was not reached or broke off; nothing is known about what it did with the request."""
