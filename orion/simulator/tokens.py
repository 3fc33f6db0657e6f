"""Made-up training data: sequences that a tiny model can learn, as a pure function of (run seed, data id).

It stands where `TokenDataset` stands in production. Each sequence counts up from a random token by one of a few
strides, so the next token follows from the last two; a share of the tokens is noise, so that the loss has a floor.

Shapes: B sequences, U = T + 1 tokens of a sequence.
"""

from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt

STRIDES = (1, 3)
NOISE_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class SyntheticTokens:
    """Tokens of any data id."""

    vocab_size: int
    num_sequences: int
    """B."""
    sequence_width: int
    """U."""

    def microbatch(self, run_seed: int, data_id: int) -> npt.NDArray[np.int64]:
        """Token ids ids_BU."""
        rng = Random(f"synthetic tokens {int(run_seed)} {int(data_id)}")
        return np.array([self._sequence(rng) for _ in range(self.num_sequences)], dtype=np.int64)

    def _sequence(self, rng: Random) -> list[int]:
        token, stride = rng.randrange(self.vocab_size), rng.choice(STRIDES)
        ids = [(token + stride * place) % self.vocab_size for place in range(self.sequence_width)]
        return [rng.randrange(self.vocab_size) if rng.random() < NOISE_SHARE else token_id for token_id in ids]
