"""One partition's mean: from the encoded slices of all contributors to the bytes that all reducers must agree on.

Pure and synchronous; miners reduce with it, validators check them with it. Owns the rule of what counts, and how much:

1. What has the wrong size or layout, or is not finite, is left out.
2. Of slices with the same values (other than all zeros) only the first in the plan's order counts: the same work must
   not weigh twice. Nobody can copy honest work, because digests are committed before anybody can read a slice, and late
   slices, which may be read before the others are announced, come first in the plan.
3. Weights are microbatches, discounted by age (`age`). Two slices of one miner, of which one is late, are joined first,
   to their weighted mean: each miner has one voice in what follows, or being late would double it.
4. Among three voices or more, a norm above `NORM_RATIO_MAX` × the median is left out, and one above `NORM_CLIP_RATIO` ×
   the median is scaled down to that.
5. What is left is averaged by the run's rule: weighted, or trimmed value by value.

The same bytes give the same mean and the same exclusions everywhere: everything runs in fp32 on the host, in the plan's
order, and norms are the same to the last bit on every device.

Letters in names: N values of the partition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from orion.common.ids import Hotkey
from orion.common.protocol.age import aged
from orion.common.protocol.codec import Body, body_size, decode, encode
from orion.common.protocol.messages import Contribution, Exclusion, ObjectRef
from orion.common.protocol.refusals import RefusedError
from orion.common.train.compress import CodecName, DecodeError, PseudoGradientCodec, TensorSpec, codec_for
from orion.common.train.outer import contribution_norm, trimmed_mean, weighted_mean_in_order
from orion.common.train.partition import partition_bounds, select_contributions

MeanRule = Literal["weighted", "trimmed"]
"""How a mean is made of what counts. `weighted`: by microbatches and age. `trimmed`: of `TRIM_CONTRIBUTORS_MIN` or
more, each value's smallest and largest `TRIM_SHARE` are left out and the others count alike, so that no minority of
that share moves any value beyond what honest contributors say; of fewer as `weighted`."""

SliceCodec = CodecName | PseudoGradientCodec
"""A codec by name, or one that is made for its partition (`orion.common.train.slice_codec`)."""

TRIM_CONTRIBUTORS_MIN = 5
TRIM_SHARE = 0.2
"""Cut on either side, at least one."""

NORM_RATIO_MAX = 10.0
"""Times the median norm. Honest replicas of a stage, which start from one anchor and take about as many steps, lie
within a factor of two of each other."""
NORM_CLIP_RATIO = 3.0
"""Times the median norm: above what honest replicas of unlike speed differ by, and low enough that who is alone with a
large step moves the mean by no more than three others do."""

WRONG_SIZE = "wrong size"
DUPLICATE = "the same values as another contribution"


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """One contributor's encoded part of its pseudo-gradient."""

    hotkey: Hotkey
    num_microbatches: int
    """That it counts for."""
    body: bytearray | None
    """None: its size is not that of this partition, so it was not fetched."""
    age: int = 0
    """Outer steps that it comes late."""

    @property
    def weight(self) -> float:
        return aged(float(self.num_microbatches), self.age)


Place = int
"""Of a contribution in its plan."""


@dataclass(frozen=True, slots=True, eq=False)
class Reduction:
    """What a reducer delivers."""

    mean: Body | None
    """None: nothing was fit to enter it."""
    excluded: tuple[Exclusion, ...]


def slice_spec(codec: SliceCodec, num_values: int) -> dict[str, TensorSpec]:
    """What the body of a slice of so many values must hold."""
    return _chosen(codec).layout(num_values)


def slice_refs(
    codec: SliceCodec, num_values: int, contributions: Sequence[Contribution], partition_index: int
) -> dict[Place, ObjectRef]:
    """The objects of a partition of so many values that are worth fetching: those of the right size."""
    size_bytes = body_size(slice_spec(codec, num_values))
    return {
        place: contribution.objects[partition_index]
        for place, contribution in enumerate(contributions)
        if partition_index < len(contribution.objects)
        and contribution.objects[partition_index].size_bytes == size_bytes
    }


def slices_in_order(contributions: Sequence[Contribution], bodies: Mapping[Place, bytearray]) -> list[Slice]:
    """What is reduced: every contribution in the plan's order, without a body where none was worth fetching."""
    return [
        Slice(contribution.hotkey, contribution.num_microbatches, bodies.get(place), contribution.age)
        for place, contribution in enumerate(contributions)
    ]


def encode_slice(codec: SliceCodec, values_N: Tensor) -> Body:
    """The body of a contributor's slice: finite fp32 values in host memory."""
    return encode(_chosen(codec).encode(values_N, None).tensors)


def encode_slice_with_error(
    codec: SliceCodec, values_N: Tensor, error_N: Tensor | None = None
) -> tuple[Body, Tensor | None]:
    """As `encode_slice`; also the next error state, where the codec has one.

    `error_N`: the error state so far, None at first and where the codec has none."""
    encoded = _chosen(codec).encode(values_N, error_N)
    return encode(encoded.tensors), encoded.residual_N


def encode_slice_and_read(
    codec: SliceCodec, values_N: Tensor, error_N: Tensor | None = None
) -> tuple[Body, Tensor, Tensor | None]:
    """As `encode_slice_with_error`; also what others read of it, fp32."""
    chosen = _chosen(codec)
    encoded = chosen.encode(values_N, error_N)
    return encode(encoded.tensors), chosen.decode(encoded.tensors, values_N.numel()), encoded.residual_N


def through_codec(codec: SliceCodec, values_N: Tensor, error_N: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """What others read of a contributor's slice, less what the codec loses; and the next error state."""
    chosen = _chosen(codec)
    encoded = chosen.encode(values_N, error_N)
    return chosen.decode(encoded.tensors, values_N.numel()), encoded.residual_N


def join_slices(codecs: Sequence[SliceCodec], num_params: int, bodies: Sequence[bytearray | None]) -> Tensor | None:
    """What others read of a whole contribution, fp32 of the stage's length, from the bodies of its slices in the order
    of the partitions, each with its codec; None when there are no bodies, or one of them cannot be read."""
    if not bodies:
        return None
    partitions = partition_bounds(num_params, len(bodies))
    values = [
        decode_slice(codec, partition.num_params, body)
        for codec, partition, body in zip(codecs, partitions, bodies, strict=True)
    ]
    readable = [each for each in values if isinstance(each, Tensor)]
    return torch.cat(readable) if len(readable) == len(values) else None


def reduce_partition(
    codec: SliceCodec, num_values: int, slices: Sequence[Slice], rule: MeanRule = "weighted"
) -> Reduction:
    """The mean of the slices, in the given order, without those that are unfit."""
    reasons: dict[Place, str] = {}
    values: dict[Place, Tensor] = {}
    for place, part in enumerate(slices):
        decoded = decode_slice(codec, num_values, part.body)
        if isinstance(decoded, str):
            reasons[place] = decoded
        else:
            values[place] = decoded
    norms = {place: contribution_norm(values_N) for place, values_N in values.items()}
    for place in _duplicates(norms, values):
        reasons[place] = DUPLICATE
        del norms[place]
    voices = _voices(slices, values, norms)
    selection = select_contributions({voice.places[0]: voice.norm for voice in voices}, NORM_RATIO_MAX, NORM_CLIP_RATIO)
    for voice in voices:
        if voice.places[0] in selection.rejected:
            reasons.update(dict.fromkeys(voice.places, selection.rejected[voice.places[0]]))
    excluded = tuple(
        Exclusion(hotkey=part.hotkey, age=part.age, reason=reasons[place][:500])
        for place, part in enumerate(slices)
        if place in reasons
    )
    if not selection.accepted:
        return Reduction(None, excluded)
    weighted = [
        (voice.weight, _scaled(voice.values_N, selection.scales.get(voice.places[0])))
        for voice in voices
        if voice.places[0] not in selection.rejected
    ]
    return Reduction(encode({"mean": _mean(weighted, rule)}), excluded)


@dataclass(frozen=True, slots=True, eq=False)
class _Voice:
    """All that one miner says."""

    places: tuple[Place, ...]
    weight: float
    values_N: Tensor
    norm: float


def _voices(slices: Sequence[Slice], values: Mapping[Place, Tensor], norms: Mapping[Place, float]) -> list[_Voice]:
    """The slices that have norms, those of one miner joined, in the order of each one's first."""
    by_hotkey: dict[Hotkey, list[Place]] = {}
    for place in norms:
        by_hotkey.setdefault(slices[place].hotkey, []).append(place)
    voices: list[_Voice] = []
    for places in by_hotkey.values():
        parts = [(slices[place].weight, values[place]) for place in places]
        if len(places) == 1:
            voices.append(_Voice(tuple(places), *parts[0], norms[places[0]]))
            continue
        joined_N = weighted_mean_in_order(parts)
        voices.append(_Voice(tuple(places), sum(weight for weight, _ in parts), joined_N, contribution_norm(joined_N)))
    return voices


def _duplicates(norms: Mapping[Place, float], values: Mapping[Place, Tensor]) -> list[Place]:
    """Places of slices that say what an earlier one says. Zeros say nothing."""
    first_with: dict[float, list[Place]] = {}
    found: list[Place] = []
    for place, norm in norms.items():
        earlier = first_with.setdefault(norm, [])
        if norm > 0 and any(torch.equal(values[place], values[other]) for other in earlier):
            found.append(place)
        else:
            earlier.append(place)
    return found


def _scaled(values_N: Tensor, scale: float | None) -> Tensor:
    return values_N if scale is None else torch.mul(values_N, scale)


def _mean(weighted: Sequence[tuple[float, Tensor]], rule: MeanRule) -> Tensor:
    if rule == "weighted" or len(weighted) < TRIM_CONTRIBUTORS_MIN:
        return weighted_mean_in_order(weighted)
    return trimmed_mean([values_N for _, values_N in weighted], max(1, int(len(weighted) * TRIM_SHARE)))


def _chosen(codec: SliceCodec) -> PseudoGradientCodec:
    return codec_for(codec) if isinstance(codec, str) else codec


def decode_slice(codec: SliceCodec, num_values: int, body: bytearray | None) -> Tensor | str:
    """The slice's values (None: one of the wrong size), or why it has none."""
    if body is None:
        return WRONG_SIZE
    try:
        tensors = decode(body, slice_spec(codec, num_values), len(body))
        return _chosen(codec).decode(tensors, num_values)
    except RefusedError as error:
        return error.refusal.message
    except DecodeError as error:
        return str(error)
