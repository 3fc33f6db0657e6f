"""How many matrices Muon takes through its iteration together. Pure; the memory plan counts with it."""

MATRIX_VALUES_MAX = 1 << 28
"""Values of the matrices that go through together, unless a single one has more: 1 GiB in fp32, a few times over while
they are worked on. Small matrices gain by company; large ones fill a device alone."""


def matrices_together(matrix_values: int) -> int:
    """How many matrices of that many values go through together; at least one."""
    return max(1, MATRIX_VALUES_MAX // matrix_values)
