"""`RunSpec`: all that every process of a run must agree on.

Each part owns its own section; this file only puts them together, checks what they demand of each other, and
gives the digest that travels in every request. What only one process cares about (ports, wallets, devices,
budgets) is not here but in that role's own config.
"""

import json
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from orion.common.errors import ConfigError
from orion.common.ids import Digest
from orion.common.model.config import ModelConfig
from orion.common.model.sizes import stage_size
from orion.common.model.splits import StageLayout, stage_layouts
from orion.common.train.config import InnerConfig, OuterConfig
from orion.common.train.data_config import DataConfig

Seconds = Annotated[float, Field(gt=0, le=30 * 24 * 3600, allow_inf_nan=False)]


class Section(BaseModel):
    """Base of every section: frozen, strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TimeLimits(Section):
    """Bounds on waiting. No peer can make anyone wait longer than these."""

    train_s: Seconds = 600.0
    """A stage leaves the train phase after this, whatever is still in flight."""
    transfer_grace_s: Seconds = 20.0
    """What an upload or download phase may take beyond bytes ÷ `bandwidth_floor_bytes_per_s`."""
    bandwidth_floor_bytes_per_s: Annotated[float, Field(gt=0)] = 2.5e6
    """Slowest link that a phase's deadline still waits for (2.5e6 = 20 Mbit/s)."""
    microbatch_s: Seconds = 60.0
    """From lease to end; later it is cancelled and its data leased again."""
    member_s: Seconds = 15.0
    """Silence after which a miner is taken for gone."""
    run_s: Seconds | None = None
    """The run ends after the outer step during which this passes; None = only `outer_steps` ends it."""


class FlowLimits(Section):
    """Bounds on what a miner holds."""

    in_flight_max: Annotated[int, Field(ge=1, le=4096)] = 24
    """Microbatches a miner admits at a time: its credits. How many are really in flight follows from the pipeline's own
    time and rate; this only bounds it."""
    graph_memory_bytes: Annotated[int, Field(ge=0, le=2**50)] = 1024**3
    """Device memory for graphs that are kept from forward to backward. Beyond it only the stage's input is kept, and
    backward computes the forward again. `orion plan` says how many graphs that makes."""
    staleness_max: Annotated[int, Field(ge=0, le=64)] = 8
    """Inner steps that may pass between a microbatch's forward and its backward."""


class ValidationRules(Section):
    """How much is checked, and what still counts as honest."""

    checks_per_outer_step: Annotated[int, Field(ge=0, le=1024)] = 1
    """Miners whose log one validator replays per outer step; up to a quarter more while some were not verified yet."""
    reductions_per_outer_step: Annotated[int, Field(ge=0, le=4096)] = 2
    """Partitions, of all stages together, whose mean one validator reduces again per outer step."""
    replay_ops_max: Annotated[int, Field(ge=1)] = 16
    """Longest prefix of a log that is replayed; which prefix is drawn after the commitment."""
    commit_s: Seconds = 3.0
    """Between two commitments of a miner to its log while it works: what it does within them is lost with its process,
    and is not paid."""
    whole_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Of the checks, those that replay the whole log and compare the pseudo-gradient with what was uploaded."""
    cosine_min: Annotated[float, Field(gt=0, le=1)] = 0.999
    """Between what a miner sent and what the replay gives, for activations and their gradients."""
    norm_ratio_min: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Shorter ÷ longer of the two."""
    pseudo_gradient_cosine_min: Annotated[float, Field(gt=0, le=1)] = 0.98
    """The same for each partition of a pseudo-gradient, in which the noise of many inner steps has added up."""
    pseudo_gradient_norm_ratio_min: Annotated[float, Field(gt=0, le=1)] = 0.99
    answer_s: Seconds = 15.0
    """How long after the run's end miners go on answering validators, so that the last outer step is checked too."""
    score_window_outer_steps: Annotated[int, Field(ge=1)] = 50
    """Verified work older than this no longer counts."""
    unverified_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """What a miner's work counts while no replay of a whole outer step of its has passed in that window."""
    burn_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the chain weight that goes to the subnet owner's uid."""

    @property
    def tensor_tolerance(self) -> "Tolerance":
        """For what crosses a stage boundary."""
        return Tolerance(self.cosine_min, self.norm_ratio_min)

    @property
    def pseudo_gradient_tolerance(self) -> "Tolerance":
        """For one partition of a pseudo-gradient."""
        return Tolerance(self.pseudo_gradient_cosine_min, self.pseudo_gradient_norm_ratio_min)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How alike two tensors must be to count as the same."""

    cosine_min: float
    norm_ratio_min: float


class StageStart(Section):
    """One stage of the checkpoint that a run goes on from."""

    state_digest: Annotated[Digest, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of anchor, momentum and outer step (`orion.common.train.outer.state_digest`)."""
    object_digest: Annotated[Digest, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the stored object."""
    size_bytes: Annotated[int, Field(ge=1, le=2**53)]
    """Of the stored object."""


class RunStart(Section):
    """Where a run begins that goes on from another one's checkpoint. Filled in by `--from`, not by hand."""

    run_digest: Annotated[Digest, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the run that left it."""
    outer_step: Annotated[int, Field(ge=1, le=2**31)]
    """The first one of this run: at its start the checkpoint stands."""
    next_data_id: Annotated[int, Field(ge=0, le=2**53)]
    """Microbatches of data below it have been used."""
    stages: Annotated[tuple[StageStart, ...], Field(min_length=1, max_length=512)]


class RunSpec(Section):
    """One training run."""

    run_id: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    model: ModelConfig
    data: DataConfig
    data_digest: Digest | None = None
    """Digest of the prepared data; filled in when the data is prepared, so that nobody trains on other tokens."""
    num_stages: Annotated[int, Field(ge=1, le=512)]
    replicas: Annotated[int, Field(ge=1, le=4096)]
    """Miners wanted per stage; the run starts when every stage has this many."""
    split: Literal["balanced", "cost"] = "balanced"
    outer_steps: Annotated[int, Field(ge=1)]
    inner_steps: Annotated[int, Field(ge=1, le=10_000)]
    """Inner steps per miner and outer step (H)."""
    microbatches_per_step: Annotated[int, Field(ge=1, le=4096)]
    """Microbatches a miner accumulates before an inner step."""
    sync: Literal["blocking", "overlapped"] = "blocking"
    """`blocking`: nobody trains while a stage merges. `overlapped`: an outer step trains while the one before is
    uploaded and merged, and ends no sooner than that is applied."""
    inner: InnerConfig = InnerConfig()
    outer: OuterConfig = OuterConfig()
    codec: Literal["none", "bf16", "int8", "topk"] = "none"
    """How pseudo-gradients are encoded for upload. `topk` sends 1.6 % of the values, in two bits, and adds what it did
    not send to the next upload."""
    codec_boundaries: Literal["none", "bf16"] | None = None
    """How the boundaries' maps are encoded under `int8` or `topk`; None = as the rest. They are a small part of a
    stage, and everything that crosses goes through them."""
    mean: Literal["weighted", "trimmed"] = "weighted"
    """How contributions become a mean (`orion.common.protocol.reduction.MeanRule`); `trimmed` needs five replicas to
    make a difference."""
    num_partitions: Annotated[int, Field(ge=1, le=4096)] = 4
    """Partitions of each stage's flat vector, each reduced by two replicas."""
    quorum: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of a stage's contributors that an outer step needs once its deadline has passed; one always does."""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """What crosses a stage boundary."""
    checkpoint_every: Annotated[int, Field(ge=1, le=64)] = 1
    """Outer steps between uploads of a stage's whole anchor; between them it follows from the manifests."""
    keep_outer_steps: Annotated[int, Field(ge=2, le=1024)] = 4
    """Outer steps whose objects stay in the store."""
    start: RunStart | None = None
    """The checkpoint that the run goes on from; None = it begins with parameters drawn from its seed."""
    time_limits: TimeLimits = TimeLimits()
    flow: FlowLimits = FlowLimits()
    validation: ValidationRules = ValidationRules()

    @model_validator(mode="after")
    def _check(self) -> "RunSpec":
        if self.data.sequence_length > self.model.context_length:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} exceeds the model's context of "
                f"{self.model.context_length} tokens; shorten the sequences or choose another model"
            )
        if self.num_stages > self.model.num_blocks:
            raise ValueError(
                f"num_stages {self.num_stages} exceeds the model's {self.model.num_blocks} blocks; "
                "use fewer stages or a deeper model"
            )
        if self.num_stages > 1 and self.model.tie_embeddings:
            raise ValueError("tie_embeddings needs num_stages = 1: the embedding and the head lie on different miners")
        if self.codec_boundaries is not None and self.codec not in ("int8", "topk"):
            raise ValueError(f"codec_boundaries is for the codecs int8 and topk; {self.codec} keeps all values dense")
        if self.keep_outer_steps <= self.checkpoint_every:
            raise ValueError("keep_outer_steps must exceed checkpoint_every, or a newcomer could not rebuild an anchor")
        if self.start is not None:
            _check_start(self.start, self.outer_steps, self.num_stages)
        return self

    @classmethod
    def load(cls, path: Path, overrides: dict[str, Any] | None = None) -> "RunSpec":
        """Reads a run file, TOML or JSON; `overrides` replaces top-level or dotted keys (`"time_limits.run_s"`).

        Raises ConfigError with one line per mistake.
        """
        try:
            text = path.read_text(encoding="utf-8")
            tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except FileNotFoundError:
            raise ConfigError(f"no run file {path}; the ones that ship are in runs/") from None
        except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from None
        for dotted, value in (overrides or {}).items():
            _set(tree, dotted.split("."), value)
        return cls.parse(tree, str(path))

    @classmethod
    def parse(cls, tree: dict[str, Any], where: str) -> "RunSpec":
        """Checks an already read tree; a model given as `{preset = "local", …}` starts from that preset."""
        model = dict(tree.get("model", {}))
        if preset := model.pop("preset", None):
            base = ModelConfig.preset(preset).model_dump()
            boundary = {**base["boundary"], **model.pop("boundary", {})}
            tree = {**tree, "model": {**base, **model, "boundary": boundary}}
        tree = _with_schedule(tree)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError("; ".join(_line(where, item) for item in error.errors())) from None

    def with_values(self, overrides: dict[str, Any]) -> "RunSpec":
        """The run with other values for some top-level or dotted keys. Raises ConfigError."""
        tree = self.model_dump(mode="json")
        for dotted, value in overrides.items():
            _set(tree, dotted.split("."), value)
        return RunSpec.parse(tree, "the run")

    @cached_property
    def digest(self) -> Digest:
        """Changes with any value that the processes must agree on."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return Digest(blake3(canonical.encode()).hexdigest())

    @property
    def first_outer_step(self) -> int:
        """The run's first: 0, or where the checkpoint stands that it goes on from."""
        return 0 if self.start is None else self.start.outer_step

    @property
    def layouts(self) -> tuple[StageLayout, ...]:
        """Which blocks each stage holds."""
        return stage_layouts(self.model, self.num_stages, self.split)

    @cached_property
    def stage_sizes(self) -> tuple[int, ...]:
        """Parameters of each stage, boundaries included."""
        return tuple(stage_size(self.model, layout) for layout in self.layouts)

    @property
    def evidence_operations_min(self) -> int:
        """Leading operations of an outer step whose tensors a miner must keep.

        Where whole logs are replayed: what twice an even share of the microbatches makes, forward, backward and inner
        steps. Replicas that are faster than that are seldom, and of them a part can be replayed.
        """
        if self.validation.whole_share == 0:
            return self.validation.replay_ops_max
        even_share = self.inner_steps * self.microbatches_per_step
        return max(self.validation.replay_ops_max, 2 * (2 * even_share + self.inner_steps))

    @property
    def tokens_per_microbatch(self) -> int:
        return self.data.sequences_per_microbatch * self.data.sequence_length


def _check_start(start: RunStart, outer_steps: int, num_stages: int) -> None:
    if start.outer_step >= outer_steps:
        raise ValueError(
            f"the checkpoint stands at outer step {start.outer_step}, and outer_steps is {outer_steps}: nothing is "
            "left to train; outer_steps counts from the very beginning, so name a larger number"
        )
    if len(start.stages) != num_stages:
        raise ValueError(f"the checkpoint has {len(start.stages)} stages, the run {num_stages}")


def _set(tree: dict[str, Any], path: list[str], value: object) -> None:
    *parents, leaf = path
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[leaf] = value


def _with_schedule(tree: dict[str, Any]) -> dict[str, Any]:
    """Lets the learning rate's schedule span the run, warm-up included, where the run does not say otherwise."""
    outer_steps, inner_steps, inner = tree.get("outer_steps"), tree.get("inner_steps"), tree.get("inner", {})
    if not isinstance(outer_steps, int) or not isinstance(inner_steps, int) or not isinstance(inner, dict):
        return tree  # the model's own check says what is wrong
    num_total_steps = outer_steps * inner_steps
    spanning = {"num_total_steps": num_total_steps, "num_warmup_steps": min(10, num_total_steps // 4)}
    return {**tree, "inner": {**inner, "schedule": {**spanning, **inner.get("schedule", {})}}}


def _line(where: str, item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = "unknown key"
    return f"{where}: {key}: {message}" if key else f"{where}: {message}"
