"""How much a contribution counts that comes an outer step late. Pure; one place for reducers, validators and scores.

A late pseudo-gradient was taken against the anchor before the one that it is merged into. Replicas of a stage descend
on alike data from the same anchor, so most of what it says stands in that anchor already, by the others' word; what is
its own is still worth having, but was not taken where it is applied. So it weighs half: AGE_DISCOUNT^age, the 1/(1+age)
of asynchronous training at the one age that there is. In a weighted mean that bounds the step too: a late contribution
makes no outer step longer, it only moves its direction.

One outer step is the whole of what an upload may be late by. A link whose upload takes longer than an outer step takes
cannot keep up at any bound, because each outer step makes another upload; one that is faster is never older than that.
"""

AGE_MAX = 1
"""Outer steps between the one that a contribution was trained in and the one that it is merged in, at most."""

AGE_DISCOUNT = 0.5
"""Of the weight, for each of them. A power of two, so that discounting rounds nothing."""


def aged(amount: float, age: int) -> float:
    """What is left of a weight, or of pay, after so many outer steps."""
    return amount * AGE_DISCOUNT**age
