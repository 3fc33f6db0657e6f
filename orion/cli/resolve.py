"""What a run file leaves open until its data is there, and what follows from replacing parts of it."""

from pathlib import Path

from orion.common.config import RunSpec
from orion.common.errors import ConfigError
from orion.common.model.config import ModelConfig
from orion.common.train.data import DatasetIndex


def resolve(spec: RunSpec, index: DatasetIndex) -> RunSpec:
    """The run with its data pinned. Raises ConfigError when the model cannot take the tokenizer's tokens."""
    if index.tokenizer.vocab_size > spec.model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {index.tokenizer.vocab_size} tokens, model.vocab_size is {spec.model.vocab_size}; "
            "choose a smaller tokenizer or a larger vocabulary"
        )
    return RunSpec.parse({**spec.model_dump(mode="json"), "data_digest": index.digest}, "resolved run")


def tokenizer_for(run_file: Path, preset: str) -> str | None:
    """The tokenizer to train when a run's model is replaced by a preset; None when the run has a ready-made one."""
    tokenizer = RunSpec.load(run_file).data.tokenizer
    return f"bpe:{ModelConfig.preset(preset).vocab_size}" if tokenizer.startswith("bpe:") else None
