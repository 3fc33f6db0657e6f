"""The development chain: a JSON-RPC server that the unmodified Bittensor SDK and `btcli` take for a subtensor node."""
