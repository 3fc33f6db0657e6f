"""The world that routing rules are compared in: who is there, how fast, how far away, and how often they drop out.

It is the world of the public pathfinding competition (macrocosm-os/apex: shared/competition/src/competition/
iota_simulator/README.md), whose simulator is not public. As described there: 96 miners in 3 to 8 stages; 75 % reliable,
15 % semi-reliable, 10 % unreliable, which differ only in how often they drop out and how soon they are back, not in
speed, latency or bandwidth; each property is drawn evenly from a range; properties drift a little between epochs; a
miner keeps at most 5 activations between their forward and their backward and stalls its forwards beyond that; its
queues have no bound; backward goes before forward; what does not get past a stage within 60 s is dropped everywhere; an
epoch ends with its 500th activation that has come back to the first stage; then all queues are cleared and 30 s of
merging follow, which do not count.

What the description leaves open is chosen here, once, before any rule was tried (every constant says what it is):
ranges of speed, latency and bandwidth; the mean times of being there and being away; that a miner that drops out loses
what it held and what it had learned; that others see so after 15 s of silence, and that until then an attempt to reach
it fails after 5 s. Miners keep their stage, stages are equally large: dividing miners among stages is another question.

Owns the draws and nothing else. A world is a pure function of its seed; churn comes from a generator of each miner's
own, so that it is the same whichever rule is tried.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random

from orion.common.ids import Hotkey

NUM_MINERS = 96
STAGES_MIN, STAGES_MAX = 3, 8
CACHE_MAX = 5
"""Activations a miner keeps between their forward and their backward."""
NUM_EPOCHS = 5
EPOCH_ACTIVATIONS = 500
MERGE_S = 30.0
STALE_S = 60.0
"""An activation that does not get past a stage within this is dropped."""

FORWARD_S = (0.25, 1.25)
"""Range of a forward pass: five times between the fastest and the slowest, as between cards people own."""
BACKWARD_FACTOR = 2.0
"""Backward ÷ forward: gradients of inputs and of parameters."""
JITTER = 0.1
"""Each pass takes up to this share more or less."""
LATENCY_S = (0.005, 0.08)
"""Range of a miner's own part of the one-way delay; two of them make a way of 10 to 160 ms."""
MESSAGE_OVERHEAD_S = 0.01
"""Of every message: connection, signature, checks."""
BANDWIDTH_BYTES_PER_S = (2.5e6, 100e6)
"""Range of up- and download: 20 to 800 Mbit/s. Transfers of one miner don't slow each other down."""
ACTIVATION_BYTES = 2_200_000
DRIFT = 0.1
"""Between epochs every property changes by up to this share."""
SILENCE_S = 15.0
"""Until the others see that a miner is away; they see at once that it is back."""
CONNECT_TIMEOUT_S = 5.0


class Reliability(StrEnum):
    """A miner's class."""

    RELIABLE = "reliable"
    SEMI = "semi"
    UNRELIABLE = "unreliable"


SHARES = {Reliability.RELIABLE: 0.75, Reliability.SEMI: 0.15, Reliability.UNRELIABLE: 0.10}

MEAN_PRESENT_S = {Reliability.RELIABLE: 3600.0, Reliability.SEMI: 600.0, Reliability.UNRELIABLE: 120.0}
"""Mean time between joining and dropping out: "very low", "low" and "moderate" drop probability over a task of some
minutes."""
MEAN_ABSENT_S = {Reliability.RELIABLE: 15.0, Reliability.SEMI: 30.0, Reliability.UNRELIABLE: 60.0}
"""Mean time until it is back: "high", "medium" and "moderate" join probability."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What a miner is like in one epoch. Times in seconds, rates in bytes per second."""

    forward_s: float
    latency_s: float
    upload: float
    download: float
    mean_present_s: float
    mean_absent_s: float

    @property
    def backward_s(self) -> float:
        """A backward pass."""
        return self.forward_s * BACKWARD_FACTOR


@dataclass(frozen=True, slots=True)
class Resident:
    """A miner of the world, and the seed of its churn and jitter."""

    hotkey: Hotkey
    stage: int
    reliability: Reliability
    epochs: tuple[Traits, ...]
    """One for each epoch."""
    seed: int


@dataclass(frozen=True, slots=True)
class World:
    """All miners, by stage of equal size (within one)."""

    seed: int
    num_stages: int
    num_activations: int
    """In an epoch."""
    residents: tuple[Resident, ...]


def draw_world(
    seed: int, *, num_epochs: int = NUM_EPOCHS, num_activations: int = EPOCH_ACTIVATIONS, num_miners: int = NUM_MINERS
) -> World:
    """The world of a seed; the numbers of stages follow each other from seed to seed, so that all are met."""
    num_stages = STAGES_MIN + seed % (STAGES_MAX - STAGES_MIN + 1)
    rng = Random(f"routing world {seed}")
    classes = _classes(num_miners)
    rng.shuffle(classes)
    residents = tuple(
        Resident(
            hotkey=Hotkey(f"miner-{index:02}"),
            stage=index % num_stages,
            reliability=reliability,
            epochs=_epochs(rng, reliability, num_epochs),
            seed=rng.getrandbits(63),
        )
        for index, reliability in enumerate(classes)
    )
    return World(seed, num_stages, num_activations, residents)


def transfer_s(sender: Traits, receiver: Traits, size_bytes: int) -> float:
    """Seconds from the first byte sent to the last byte received."""
    way_s = sender.latency_s + receiver.latency_s + MESSAGE_OVERHEAD_S
    return way_s + size_bytes / min(sender.upload, receiver.download)


def _classes(num_miners: int) -> list[Reliability]:
    num_semi, num_unreliable = (
        round(num_miners * SHARES[reliability]) for reliability in (Reliability.SEMI, Reliability.UNRELIABLE)
    )
    num_reliable = num_miners - num_semi - num_unreliable
    return (
        [Reliability.RELIABLE] * num_reliable
        + [Reliability.SEMI] * num_semi
        + [Reliability.UNRELIABLE] * num_unreliable
    )


def _epochs(rng: Random, reliability: Reliability, num_epochs: int) -> tuple[Traits, ...]:
    traits = Traits(
        forward_s=rng.uniform(*FORWARD_S),
        latency_s=rng.uniform(*LATENCY_S),
        upload=rng.uniform(*BANDWIDTH_BYTES_PER_S),
        download=rng.uniform(*BANDWIDTH_BYTES_PER_S),
        mean_present_s=MEAN_PRESENT_S[reliability],
        mean_absent_s=MEAN_ABSENT_S[reliability],
    )
    epochs = [traits]
    for _ in range(num_epochs - 1):
        epochs.append(_drifted(rng, epochs[-1]))
    return tuple(epochs)


def _drifted(rng: Random, traits: Traits) -> Traits:
    def drift(value: float) -> float:
        return value * rng.uniform(1.0 - DRIFT, 1.0 + DRIFT)

    return replace(
        traits,
        forward_s=drift(traits.forward_s),
        latency_s=drift(traits.latency_s),
        upload=drift(traits.upload),
        download=drift(traits.download),
        mean_present_s=drift(traits.mean_present_s),
        mean_absent_s=drift(traits.mean_absent_s),
    )
