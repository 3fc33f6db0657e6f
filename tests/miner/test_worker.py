"""DeviceWorker with real engines: three wired in place equal the unsplit model; what it keeps, refuses and frees."""

from random import Random

import numpy as np
import numpy.typing as npt
import pytest
import torch
from miner_kit import hotkey_of, make_spec

from orion.common.config import RunSpec
from orion.common.ids import DataId, MicrobatchId, Operation
from orion.common.model.params import init_params, matrix_params
from orion.common.model.stage import Stage, Transformer, token_loss
from orion.common.protocol.codec import decode, encode, transfer_spec
from orion.common.protocol.messages import Commitment
from orion.common.protocol.records import EvidenceRequest
from orion.common.train.anchor import initial_anchor
from orion.common.train.inner import build_inner_optimizer
from orion.common.train.schedule import learning_rate_factor
from orion.miner.cache import INCOMING, OUTGOING, Direction, Parcel, Slot, TensorCache
from orion.miner.events import (
    Backward,
    BackwardDone,
    ComputeRefused,
    EncodePseudoGradient,
    Forward,
    ForwardDone,
    InnerStep,
    InnerStepDone,
    PseudoGradientEncoded,
)
from orion.miner.memory_archive import MemoryArchive, MemoryDisk
from orion.miner.worker import DeviceWorker

SPEC = make_spec(3, inner={"clip_norm": 1e6, "schedule": {"shape": "constant", "num_warmup_steps": 0}})
ONE = MicrobatchId(1)


class Tokens:
    """Random ids, a function of the data id."""

    def microbatch(self, run_seed: int, data_id: int) -> npt.NDArray[np.int64]:
        rng = Random(f"{run_seed} {data_id}")
        data = SPEC.data
        return np.array(
            [
                [rng.randrange(64) for _ in range(data.sequence_length + 1)]
                for _ in range(data.sequences_per_microbatch)
            ],
            dtype=np.int64,
        )


class Bench(DeviceWorker):
    """A worker with an anchor, and what it shares with others."""

    def __init__(self, stage_index: int, spec: RunSpec = SPEC) -> None:
        self.cache = TensorCache(spec.flow.in_flight_max)
        self.evidence = MemoryArchive(MemoryDisk(), 1 << 20)
        super().__init__(
            spec,
            hotkey_of(stage_index, 0),
            cache=self.cache,
            evidence=self.evidence,
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
        )
        self.tokens = Tokens()
        self.load(stage_index, initial_anchor(spec, stage_index))


def hand_over(source: Bench, target: Bench, number: int, direction: Direction, to_stage: int) -> None:
    """As the network does it: bytes out, checked tensors in."""
    out = source.cache.get(MicrobatchId(number), OUTGOING[direction])
    assert out is not None
    expected = transfer_spec(SPEC, direction, to_stage)
    tensors = decode(bytearray(out.body.tobytes()), expected, out.body.size_bytes)
    body = encode(tensors)
    assert body.digest == out.body.digest
    target.cache.put(MicrobatchId(number), INCOMING[direction], Parcel(tensors, body))


def one_trip(workers: list[Bench], number: int, data_id: int) -> float:
    """A microbatch through all stages and back; its loss."""
    loss = None
    for stage_index, worker in enumerate(workers):
        done = worker.run(Forward(MicrobatchId(number), DataId(data_id)))
        assert isinstance(done, ForwardDone)
        loss = done.loss
        if stage_index < len(workers) - 1:
            assert done.output is not None and done.loss is None
            hand_over(worker, workers[stage_index + 1], number, Direction.ACTIVATION, stage_index + 1)
    for stage_index in range(len(workers) - 2, -1, -1):
        hand_over(workers[stage_index + 1], workers[stage_index], number, Direction.GRADIENT, stage_index)
        back = workers[stage_index].run(Backward(MicrobatchId(number)))
        assert isinstance(back, BackwardDone)
        assert (back.output is None) == (stage_index == 0)
    for worker in workers:
        worker.free(MicrobatchId(number))
    assert loss is not None
    return loss


def test_three_workers_equal_the_unsplit_model() -> None:
    workers = [Bench(stage_index) for stage_index in range(3)]
    whole = Transformer(SPEC.model, 3)
    init_params(whole, SPEC.seed)
    params = {name: param.detach() for name, param in whole.named_parameters()}
    optimizer = build_inner_optimizer(params, matrix_params(whole), SPEC.inner)

    for step in range(3):
        losses, expected = [], []
        sums = {name: torch.zeros_like(param) for name, param in params.items()}
        for place in range(SPEC.microbatches_per_step):
            number = step * SPEC.microbatches_per_step + place
            losses.append(one_trip(workers, number, number + 100))
            ids_BU = torch.from_numpy(Tokens().microbatch(SPEC.seed, number + 100))
            loss = token_loss(whole(ids_BU[:, :-1]), ids_BU[:, 1:])
            for name, gradient in zip(params, torch.autograd.grad(loss, list(whole.parameters())), strict=True):
                sums[name] += gradient / SPEC.microbatches_per_step
            expected.append(float(loss.detach()))
        assert losses == pytest.approx(expected, rel=1e-5)
        for worker in workers:
            assert worker.run(InnerStep(step, 1.0)) == InnerStepDone(SPEC.microbatches_per_step, None)
        optimizer.step(sums, learning_rate_factor(SPEC.inner.schedule, step))

    trained = dict(whole.named_parameters())
    for stage_index, worker in enumerate(workers):
        state = initial_anchor(SPEC, stage_index)
        encoded = worker.run(EncodePseudoGradient(0))
        assert isinstance(encoded, PseudoGradientEncoded)
        assert [ref.key for ref in encoded.objects] == list(worker.outbox)
        values = torch.cat([decode(body.tobytes(), None, body.size_bytes)["values"] for body in worker.outbox.values()])
        names = [name for name, _ in Stage(SPEC.model, SPEC.layouts[stage_index]).named_parameters()]
        expected_N = torch.cat([trained[name].detach().flatten() for name in names])
        assert torch.allclose(state.anchor_N - values, expected_N, atol=2e-5)
        assert float(values.abs().max()) > 1e-4
        assert (worker.num_held, worker.cache.num_microbatches) == (0, 0)


def test_what_it_hands_to_the_archive_is_what_it_sent_in_the_order_of_the_log() -> None:
    worker = Bench(0)
    for number in range(3):
        worker.run(Forward(MicrobatchId(number), DataId(number)))
    commitment = Commitment(
        outer_step=0, num_entries=3, num_applied=0, num_contributed=0, num_kept=0, root="a" * 64, is_final=False
    )
    assert worker.evidence.persist(0, (), commitment).num_kept == 3
    for number in range(3):
        request = EvidenceRequest(
            outer_step=0, microbatch_id=MicrobatchId(number), operation=Operation.FORWARD, side="output"
        )
        sent = worker.cache.get(MicrobatchId(number), Slot.ACTIVATION_OUT)
        assert sent is not None
        assert worker.evidence.get(request) == sent.body.tobytes()


def test_what_is_not_finite_is_refused_and_let_go() -> None:
    first, middle = Bench(0), Bench(1)
    first.run(Forward(ONE, DataId(1)))
    hand_over(first, middle, 1, Direction.ACTIVATION, 1)
    parcel = middle.cache.get(ONE, Slot.ACTIVATION_IN)
    assert parcel is not None
    parcel.tensors["z"].fill_(float("nan"))

    result = middle.run(Forward(ONE, DataId(1)))

    assert isinstance(result, ComputeRefused) and "finite" in result.reason
    middle.free(ONE)
    assert (middle.num_held, middle.cache.num_microbatches) == (0, 0)


def test_made_up_token_ids_never_reach_the_model() -> None:
    first, middle = Bench(0), Bench(1)
    first.run(Forward(ONE, DataId(1)))
    hand_over(first, middle, 1, Direction.ACTIVATION, 1)
    parcel = middle.cache.get(ONE, Slot.ACTIVATION_IN)
    assert parcel is not None
    parcel.tensors["ids"][0, 0] = 10**6

    assert isinstance(middle.run(Forward(ONE, DataId(1))), ComputeRefused)


def test_freeing_lets_the_engine_go_too() -> None:
    worker = Bench(0)
    worker.run(Forward(ONE, DataId(1)))
    assert worker.num_held == 1

    worker.free(ONE)
    worker.free(ONE)

    assert worker.num_held == 0
    assert isinstance(worker.run(Forward(ONE, DataId(1))), ForwardDone), "the engine no longer holds it either"


def test_loading_an_anchor_lets_everything_go() -> None:
    worker = Bench(0)
    before = worker.load(0, initial_anchor(SPEC, 0))
    worker.run(Forward(ONE, DataId(1)))

    assert worker.load(0, initial_anchor(SPEC, 0)) == before
    worker.free(ONE)
    assert worker.num_held == 0


def test_a_checkpoint_is_only_made_of_the_anchor_asked_for() -> None:
    worker = Bench(1)

    made = worker.encode_checkpoint(1, 0)

    assert made is not None
    key, body = made
    assert key.startswith("outer/0/stage/1/checkpoint/") and body.size_bytes > 8
    assert worker.encode_checkpoint(1, 1) is None
    assert worker.encode_checkpoint(0, 0) is None


def test_the_cache_is_bounded_by_the_credits() -> None:
    cache = TensorCache(1)
    parcel = Parcel({"g": torch.zeros(3)}, encode({"g": torch.zeros(3)}))
    cache.put(ONE, Slot.GRADIENT_IN, parcel)
    cache.put(ONE, Slot.GRADIENT_OUT, parcel)
    assert cache.size_bytes == 2 * parcel.body.size_bytes

    with pytest.raises(AssertionError):
        cache.put(MicrobatchId(2), Slot.GRADIENT_IN, parcel)
