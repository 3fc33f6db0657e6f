"""Merkle trees: the shape of RFC 6962, roots that grow, and proofs that hold for the truth and for nothing else."""

import pytest
from blake3 import blake3
from hypothesis import assume, given
from hypothesis import strategies as st

from orion.common.ids import Digest
from orion.common.protocol.merkle import Frontier, Mark, MerkleTree, leaf_hash, node_hash, proof_fault

records = st.lists(st.binary(max_size=3), max_size=40)


def by_definition(leaves: list[bytes]) -> bytes:
    """The root as RFC 6962 defines it, by recursion."""
    if not leaves:
        return blake3(b"").digest()
    if len(leaves) == 1:
        return leaf_hash(leaves[0])
    half = 1
    while 2 * half < len(leaves):
        half *= 2
    return node_hash(by_definition(leaves[:half]), by_definition(leaves[half:]))


@given(records)
def test_roots_are_those_of_the_definition_however_they_are_reached(leaves: list[bytes]) -> None:
    tree, frontier = MerkleTree(leaves), Frontier()
    for size in range(len(leaves) + 1):
        expected = by_definition(leaves[:size]).hex()
        assert tree.root(size) == frontier.root == expected
        if size < len(leaves):
            frontier.append(leaves[size])
    assert len(tree) == frontier.num_leaves == len(leaves)


@st.composite
def claims(draw: st.DrawFn) -> tuple[list[bytes], list[int], int, int]:
    """A list, the sizes at which its roots are known, and a range of it."""
    leaves = draw(st.lists(st.binary(max_size=3), min_size=1, max_size=40))
    sizes = draw(st.sets(st.integers(0, len(leaves)), max_size=5)) | {len(leaves)}
    start, stop = sorted(draw(st.tuples(st.integers(0, len(leaves)), st.integers(0, len(leaves)))))
    return leaves, sorted(sizes), start, stop


def marks_of(tree: MerkleTree, sizes: list[int]) -> list[Mark]:
    return [Mark(size, tree.root(size)) for size in sizes]


@given(claims())
def test_a_range_is_shown_under_the_roots_of_all_its_prefixes(claim: tuple[list[bytes], list[int], int, int]) -> None:
    leaves, sizes, start, stop = claim
    tree = MerkleTree([*leaves, b"later", b"still later"])
    proof = tree.proof(sizes, start, stop)
    assert proof_fault(marks_of(tree, sizes), start, leaves[start:stop], proof) is None


@given(claims(), st.data())
def test_nothing_else_is_shown(claim: tuple[list[bytes], list[int], int, int], data: st.DataObject) -> None:
    leaves, sizes, start, stop = claim
    tree = MerkleTree(leaves)
    marks, shown, proof = marks_of(tree, sizes), leaves[start:stop], list(tree.proof(sizes, start, stop))
    what = data.draw(st.sampled_from(["record", "root", "node", "longer", "shorter"]))
    if what == "record":
        assume(shown)
        place = data.draw(st.integers(0, len(shown) - 1))
        shown[place] = shown[place] + b"!"
    elif what == "root":
        place = data.draw(st.integers(0, len(marks) - 1))
        marks[place] = Mark(marks[place].size, Digest(blake3(b"another").hexdigest()))
    elif what == "node":
        assume(proof)
        place = data.draw(st.integers(0, len(proof) - 1))
        proof[place] = Digest(blake3(b"another").hexdigest())
    elif what == "longer":
        proof.append(Digest(blake3(b"another").hexdigest()))
    else:
        assume(proof)
        proof.pop(data.draw(st.integers(0, len(proof) - 1)))
    assert proof_fault(marks, start, shown, proof) is not None


@given(st.lists(st.binary(max_size=3), min_size=1, max_size=20), records, st.data())
def test_a_list_that_was_changed_afterwards_is_no_continuation(
    leaves: list[bytes], more: list[bytes], data: st.DataObject
) -> None:
    changed = leaves.copy()
    place = data.draw(st.integers(0, len(leaves) - 1))
    changed[place] += b"!"
    longer = MerkleTree([*changed, *more, b"end"])
    marks = [Mark(len(leaves), MerkleTree(leaves).root()), Mark(len(longer), longer.root())]
    proof = longer.proof([mark.size for mark in marks], 0, 0)
    assert proof_fault(marks, 0, [], proof) == f"the first {len(leaves)} records have another root"


def test_a_leaf_does_not_pass_for_a_node() -> None:
    left, right = leaf_hash(b"a"), leaf_hash(b"b")
    assert MerkleTree([b"a", b"b"]).root() != MerkleTree([left + right]).root()


def test_what_cannot_be_shown_or_asked_is_refused() -> None:
    tree = MerkleTree([b"a", b"b", b"c"])
    for sizes, start, stop in (([4], 0, 1), ([3], 2, 1), ([3, 3], 0, 1), ([], 0, 0), ([2], 0, 3)):
        with pytest.raises(ValueError, match=r"records|sizes"):
            tree.proof(sizes, start, stop)
    with pytest.raises(ValueError, match="4 of 3"):
        tree.root(4)
    frontier = Frontier()
    frontier.append(b"a")
    with pytest.raises(ValueError, match="height 1"):
        frontier.append_subtree(1, leaf_hash(b"x"))
    assert proof_fault([Mark(3, tree.root())], 2, [b"c", b"d"], ()) == "records 2 to 4 of a list of 3"


def test_a_proof_is_short() -> None:
    tree = MerkleTree([number.to_bytes(4, "little") for number in range(100_000)])
    assert len(tree.proof([100_000], 0, 16)) <= 2 * 17
    assert len(tree.proof([100_000], 54_321, 54_322)) <= 2 * 17
