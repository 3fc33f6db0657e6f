"""In whatever order contributions and means arrive, the stage merges the same."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from orchestrator_world import World, make_spec

from orion.common.protocol.messages import Manifest, MergePlan


def merged_in(order: Sequence[int], reversed_means: bool) -> tuple[MergePlan, Manifest]:
    """Plan and manifest of an outer step whose contributions come in that order."""
    world = World(make_spec(num_stages=1, replicas=4, num_partitions=3))
    world.start()
    applied = sorted(world.train().items())
    for place in order:
        world.upload(*applied[place])
    plan = world.plan(0)
    assert plan is not None
    reductions = [(hotkey, part.partition_index) for part in plan.partitions for hotkey in part.reducers]
    for hotkey, partition_index in reversed(reductions) if reversed_means else reductions:
        world.reduce(hotkey, partition_index)
    manifest = world.feed(world.members(0)[0]).manifest
    assert manifest is not None
    return plan, manifest


@settings(max_examples=12)
@given(st.permutations(range(4)), st.booleans())
def test_the_order_of_arrival_shows_nowhere(order: list[int], reversed_means: bool) -> None:
    plan, manifest = merged_in(order, reversed_means)
    first_plan, first_manifest = merged_in(range(4), reversed_means=False)
    assert plan == first_plan
    digests = [merged.object and merged.object.digest for merged in manifest.partitions]
    assert digests == [merged.object and merged.object.digest for merged in first_manifest.partitions]
    assert (manifest.contributors, manifest.total_microbatches) == (
        first_manifest.contributors,
        first_manifest.total_microbatches,
    )
