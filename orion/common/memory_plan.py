"""What a miner can hold at most, stage by stage, from the run's specification alone.

Owns the bound and how it is made up; pure arithmetic, no torch. Miners size themselves by it (how many graphs they
keep, how large their cache may grow) and assert it while they work; `orion plan` prints it. What is counted under
`kept_bytes` of device and host is held to exactly; `working_bytes` is an estimate from above of what comes and goes
within one operation.

Why it is a bound: a microbatch is held only with a credit, of which there are `flow.in_flight_max`; each holds at most
one tensor of each kind and one graph, or its input instead; graphs are kept only within `flow.graph_memory_bytes`; and
a version of the parameters lives only as long as a microbatch that was forwarded with it, which is let go before more
than `flow.staleness_max` inner steps have passed.

Letters: N parameters of a stage.
"""

from dataclasses import dataclass
from functools import cached_property

from orion.common.config import RunSpec
from orion.common.errors import ConfigError
from orion.common.model.activations import FP32_BYTES, ID_BYTES, graph_bytes
from orion.common.model.flops import forward_flops_per_token
from orion.common.model.sizes import stage_size
from orion.common.model.splits import StageLayout
from orion.common.train.encoded_size import encoded_bytes
from orion.common.train.muon_groups import MATRIX_VALUES_MAX

WIRE_BYTES = {"float32": 4, "bfloat16": 2}
BODY_HEADER_BYTES_MAX = 1024
"""Of a tensor body between miners."""
BODY_ID_BYTES = 4
"""A token id in a body."""
SEND_BUFFER_BYTES = 1 << 20
"""What a socket and its writer hold of one body that is being sent or read."""
TRIPS_MAX = 3
"""Of a data id, before it is given up; bounds what one outer step can make a miner compute."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes on the device, by kind."""

    master: int
    """fp32 parameters that the optimizer owns."""
    optimizer: int
    """Its state."""
    gradient_sums: int
    versions: int
    """Compute parameters: the newest, and older ones that microbatches in flight still need."""
    graphs: int
    """Kept for backward, inputs included."""
    inputs: int
    """Of microbatches without a graph, from which backward recomputes; token ids of all."""
    working: int
    """Comes and goes within one pass or inner step."""

    @property
    def kept_bytes(self) -> int:
        return self.total_bytes - self.working

    @property
    def total_bytes(self) -> int:
        return (
            self.master + self.optimizer + self.gradient_sums + self.versions + self.graphs + self.inputs + self.working
        )


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes in host memory, by kind; without the process itself."""

    outer_state: int
    """Anchor and outer momentum."""
    activations: int
    """Bodies in the cache: received, or kept until their gradient came back or was taken."""
    transfers: int
    """Buffers of sends and receipts under way."""
    evidence: int
    """What waits to be written for validators, at the very most: the whole outer step, if the disk stood still."""
    working: int
    """At the end of an outer step: pseudo-gradient, its encoding, means, next state."""

    @property
    def total_bytes(self) -> int:
        return self.outer_state + self.activations + self.transfers + self.evidence + self.working


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage's miner."""

    stage_index: int
    num_blocks: int
    num_params: int
    credits: int
    """Microbatches held at a time, at most."""
    versions_max: int
    """Versions of the compute parameters alive at a time, at most."""
    graph_bytes: int
    """Activations that one microbatch's graph keeps."""
    graphs_max: int
    """Graphs kept at a time, at most; further microbatches are recomputed. 0 on the last stage, which never waits."""
    activation_bytes: int
    """Body that goes to the next stage; 0 on the last."""
    gradient_bytes: int
    """Body that goes to the stage before; 0 on the first."""
    cache_bytes_per_microbatch: int
    flops: int
    """Of a microbatch's forward and backward, without recomputing."""
    device: DeviceMemory
    host: HostMemory

    @property
    def cache_bytes_max(self) -> int:
        """Bodies that lie in the cache, at most: those of microbatches with a credit, and returned gradients."""
        return self.credits * (self.cache_bytes_per_microbatch + self.aside_bytes)

    @property
    def aside_bytes(self) -> int:
        """A gradient that was returned and is kept in case its receiver is lost with it, of which there are as many as
        credits. The receiver may be replaced only where there is a miner before it that can do so."""
        return self.gradient_bytes if self.stage_index >= 2 else 0

    @property
    def upload_bytes(self) -> int:
        """That leave the miner for each microbatch."""
        return self.activation_bytes + self.gradient_bytes

    def bandwidth_bits_per_s(self, microbatch_s: float) -> float:
        """What must leave the miner (as much comes in) when it does a microbatch in that many seconds."""
        return 8.0 * self.upload_bytes / microbatch_s

    def fits(self, device_memory_bytes: int) -> bool:
        """Whether a device with that much memory holds all of it."""
        return self.device.total_bytes <= device_memory_bytes

    def graphs_within(self, device_memory_bytes: int) -> int:
        """How many of `graphs_max` graphs a device with that much memory can keep.

        Raises ConfigError when it doesn't even hold what is needed without any.
        """
        if self.graphs_max == 0:
            self._require(self.device.total_bytes, device_memory_bytes)
            return 0
        one_graph = self.device.graphs // self.graphs_max
        without_graphs = self.device.total_bytes - self.device.graphs
        self._require(without_graphs, device_memory_bytes)
        return min(self.graphs_max, (device_memory_bytes - without_graphs) // one_graph)

    def _require(self, needed_bytes: int, device_memory_bytes: int) -> None:
        if needed_bytes > device_memory_bytes:
            raise ConfigError(
                f"stage {self.stage_index} needs {needed_bytes / 1e9:.1f} GB of device memory at the least, and there "
                f"are {device_memory_bytes / 1e9:.1f} GB; take a larger device, or cut the model into more stages "
                "(`orion plan` shows what takes how much)"
            )


@dataclass(frozen=True)
class MemoryPlanner:
    """Plans the stages of one run for devices that compute in values of `value_bytes` (4 or 2)."""

    spec: RunSpec
    value_bytes: int
    evidence_bytes_max: int | None = None
    """A miner's budget for evidence; None: whatever one outer step makes."""

    @cached_property
    def stages(self) -> tuple[StagePlan, ...]:
        return tuple(self._stage(layout) for layout in self.spec.layouts)

    def _stage(self, layout: StageLayout) -> StagePlan:
        spec = self.spec
        num_params = stage_size(spec.model, layout)
        credits = spec.flow.in_flight_max
        graph = self._graph_bytes(layout)
        kept_graphs = 0 if layout.is_last else min(credits, spec.flow.graph_memory_bytes // graph)
        # Two while an inner step publishes the next and lets go of the last, even where nothing waits for a gradient.
        versions = 2 if layout.is_last else max(2, min(spec.flow.staleness_max, credits) + 1)
        # What is merged beside training makes a version of its own, between two inner steps.
        versions += spec.sync == "overlapped"
        activation, gradient = self._body_bytes
        sent_on = 0 if layout.is_last else activation
        sent_back = 0 if layout.is_first else gradient
        cached = (0 if layout.is_last else activation + gradient) + (0 if layout.is_first else activation + gradient)
        tokens = spec.tokens_per_microbatch
        return StagePlan(
            stage_index=layout.stage_index,
            num_blocks=layout.num_blocks,
            num_params=num_params,
            credits=credits,
            versions_max=versions,
            graph_bytes=graph,
            graphs_max=kept_graphs,
            activation_bytes=sent_on,
            gradient_bytes=sent_back,
            cache_bytes_per_microbatch=cached,
            flops=3 * tokens * forward_flops_per_token(spec.model, layout, spec.data.sequence_length),
            device=self._device(layout, num_params, graph, kept_graphs, versions),
            host=self._host(
                layout, num_params, cached, sent_on + sent_back, sent_back if layout.stage_index >= 2 else 0
            ),
        )

    def _graph_bytes(self, layout: StageLayout) -> int:
        data = self.spec.data
        return graph_bytes(
            self.spec.model,
            layout,
            sequence_length=data.sequence_length,
            sequences=data.sequences_per_microbatch,
            value_bytes=self.value_bytes,
        )

    @property
    def _body_bytes(self) -> tuple[int, int]:
        """Of an activation, which takes the token ids along, and of a gradient."""
        spec = self.spec
        narrow = spec.tokens_per_microbatch * spec.model.boundary_width * WIRE_BYTES[spec.wire_dtype]
        num_ids = spec.tokens_per_microbatch + spec.data.sequences_per_microbatch
        return narrow + num_ids * BODY_ID_BYTES + BODY_HEADER_BYTES_MAX, narrow + BODY_HEADER_BYTES_MAX

    def _device(
        self, layout: StageLayout, num_params: int, graph: int, kept_graphs: int, versions: int
    ) -> DeviceMemory:
        spec, credits = self.spec, self.spec.flow.in_flight_max
        matrices = layout.num_blocks * spec.model.block_matrix_size
        uses_muon = spec.inner.optimizer == "muon"
        two_moments = num_params - matrices if uses_muon else num_params
        one_mean = matrices if uses_muon else 0
        waiting = 0 if layout.is_last else credits
        tokens = spec.tokens_per_microbatch
        num_ids = tokens + spec.data.sequences_per_microbatch
        input_bytes = 0 if layout.is_first else tokens * spec.model.boundary_width * self.value_bytes
        return DeviceMemory(
            master=num_params * FP32_BYTES,
            optimizer=(two_moments * 2 + one_mean) * FP32_BYTES,
            gradient_sums=num_params * FP32_BYTES,
            versions=versions * num_params * self.value_bytes,
            graphs=kept_graphs * (graph + input_bytes),
            inputs=waiting * num_ids * ID_BYTES + (waiting - kept_graphs) * input_bytes if waiting else 0,
            working=max(self._pass_bytes(layout, num_params, graph), self._step_bytes(two_moments, matrices)),
        )

    def _pass_bytes(self, layout: StageLayout, num_params: int, graph: int) -> int:
        """One graph (recomputed, or the last stage's), all parameters' gradients, and the widest tensors passing by."""
        model, tokens = self.spec.model, self.spec.tokens_per_microbatch
        passing = 4 * tokens * max(model.ffn_width * self.value_bytes, model.width * FP32_BYTES)
        logits = 3 * tokens * model.vocab_size * FP32_BYTES if layout.is_last else 0
        return graph + num_params * self.value_bytes + passing + logits

    def _step_bytes(self, two_moments: int, matrices: int) -> int:
        """Muon's matrices that go through the iteration together, in half a dozen copies; AdamW's two temporaries."""
        model = self.spec.model
        largest = model.width * max(model.ffn_width, model.attention_width)
        together = min(matrices, max(MATRIX_VALUES_MAX, largest)) if self.spec.inner.optimizer == "muon" else 0
        return max(6 * together * FP32_BYTES, 2 * two_moments * FP32_BYTES)

    def _host(self, layout: StageLayout, num_params: int, cached: int, sent: int, aside: int) -> HostMemory:
        spec = self.spec
        # Of what one operation takes in and gives out; every data id of the outer step, as often as it may be tried.
        num_microbatches = TRIPS_MAX * spec.inner_steps * spec.microbatches_per_step * spec.replicas
        evidence = num_microbatches * cached
        if self.evidence_bytes_max is not None:
            evidence = min(evidence, self.evidence_bytes_max)
        encoded = encoded_bytes(spec, layout, num_params)
        return HostMemory(
            # Overlapped: the next outer step's beginning too, while the anchor before it is merged.
            outer_state=(2 + (spec.sync == "overlapped")) * num_params * FP32_BYTES,
            activations=spec.flow.in_flight_max * (cached + aside),
            transfers=2 * spec.flow.in_flight_max * min(SEND_BUFFER_BYTES, sent),
            evidence=evidence,
            # Parameters flattened and their difference with its encoding; later the mean, and the state that it makes.
            # And the encoding before, while its upload is late.
            working=max(2 * num_params * FP32_BYTES + encoded, 4 * num_params * FP32_BYTES) + encoded,
        )


def plan_stages(spec: RunSpec, value_bytes: int, evidence_bytes_max: int | None = None) -> tuple[StagePlan, ...]:
    """What each stage's miner can hold at most, where it computes in values of `value_bytes`: 4 (fp32) or 2 (bf16)."""
    return MemoryPlanner(spec, value_bytes, evidence_bytes_max).stages
