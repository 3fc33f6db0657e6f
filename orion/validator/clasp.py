"""CLASP: which miners make the losses of their paths worse, from path and loss of every applied trip. Pure.

Owns one regression: loss = trend of its outer step + one effect per member of each stage. A member's effect is told
relative to the average trip through its stage, with a confidence interval, so that a hard batch or a bad neighbour is
not held against it. The estimate is an alarm for replay, never a verdict.

How sure it is: standard errors are HC3 (they allow every loss its own spread); intervals are simultaneous over all
members (Bonferroni), so that at most 2.5 % of rounds raise any false alarm. Losses and paths are what miners report,
hence two guards: no loss counts as further off than `CLIP_SPREADS` spreads, and an effect only alarms when it shows
through most partners of each other stage, so that one liar cannot frame anybody (`MemberEffect.effect_confirmed`).

What it cannot see: harm that does not show in the loss of a miner's own paths (a false pseudo-gradient, a skipped
step), a stage that is bad as a whole or has one member, and first-stage and last-stage miners that lie about the loss
of their own paths: they are the ones who compute and report it.

Letters in names: N pathways, S stages, P columns of the regression, Q columns that are not zero in any one row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from orion.common.ids import Hotkey
from orion.common.protocol.records import Pathways

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

CONFIDENCE = 0.95
"""That all intervals of a round hold at the same time."""
PATHWAYS_MAX = 100_000
"""Newest pathways that are looked at: some tenths of a second."""
MEMBERS_MAX = 1_024
"""Beyond, nothing is estimated; a subnet has 256 slots."""
TRIPS_MIN = 6
"""A member of fewer trips gets no estimate."""
FREEDOM_MIN = 12
"""Pathways beyond the number of columns that the regression needs."""
TREND_PATHWAYS = 16
"""Pathways of an outer step for each further term of its trend: a level, then a slope, then a curve."""
TREND_TERMS_MAX = 3
CLIP_SPREADS = 10.0
"""Robust standard deviations from its outer step's median beyond which a loss is taken for one this far off."""
LOSS_MAX = 1e6
"""Nats beyond which a reported loss says nothing; keeps the arithmetic finite."""
CONFIRMED_SHARE = 0.5
"""Of an effect, what the guard against single liars must leave of it."""
_PAIR_TRIPS_MIN = 2
"""Trips that two members must share before one tells something about the other."""
_MAD_TO_SPREAD = 1.4826
_RANK_TOLERANCE = 1e-9
_UNSEEN_MAX = 1e-6
_ERROR_MIN = 1e-12
"""Nats; below, a standard error is rounding: the member is alone in its stage, or all losses are equal."""
_LEFT_MIN = 0.05
"""Least of 1 − leverage: a pathway that the regression follows exactly has no spread of its own to show."""


@dataclass(frozen=True, slots=True, eq=False)
class PathwayTable:
    """Pathways as columns; a member is one miner in one stage."""

    members: tuple[tuple[int, Hotkey], ...]
    """Stage and hotkey of each member."""
    paths_NS: Integers
    """Places in `members`."""
    losses_N: Floats
    outer_steps_N: Integers
    """In order of arrival within each outer step."""


@dataclass(frozen=True, slots=True)
class MemberEffect:
    """What a member does to the loss of its paths, in nats per token against its stage's average trip."""

    hotkey: Hotkey
    stage_index: int
    num_pathways: int
    effect: float
    standard_error: float
    lower: float
    """The interval holds for all members at once."""
    upper: float
    p_value: float
    """Of an effect this high or higher by chance; for this member alone."""
    effect_confirmed: float
    """The least, over the other stages, of the middle partner's view: what remains if any one partner lies."""

    @property
    def is_alarming(self) -> bool:
        """Whether the miner should be looked at soon."""
        return self.lower > 0.0 and self.effect_confirmed >= CONFIRMED_SHARE * self.effect


@dataclass(frozen=True, slots=True, eq=False)
class _Design:
    """A sparse design matrix: row n has `values_NQ[n, q]` in column `columns_NQ[n, q]`."""

    columns_NQ: Integers
    values_NQ: Floats
    num_columns: int
    first_member: int
    """Column of the first member; the trends' are before it."""


def pathway_table(pages: Sequence[Pathways]) -> PathwayTable:
    """Puts pages together; their order within an outer step is that of arrival."""
    members: dict[tuple[int, Hotkey], int] = {}
    paths: list[list[int]] = []
    losses: list[float] = []
    outer_steps: list[int] = []
    for page in sorted(pages, key=lambda page: page.outer_step):
        for pathway in page.pathways:
            named = [(stage, page.miners[place]) for stage, place in enumerate(pathway.path)]
            paths.append([members.setdefault(member, len(members)) for member in named])
            losses.append(pathway.loss)
            outer_steps.append(page.outer_step)
    num_stages = max(map(len, paths), default=0)
    return PathwayTable(
        members=tuple(members),
        paths_NS=np.array(paths, dtype=np.int64).reshape(len(paths), num_stages),
        losses_N=np.array(losses, dtype=np.float64),
        outer_steps_N=np.array(outer_steps, dtype=np.int64),
    )


def member_effects(table: PathwayTable) -> tuple[MemberEffect, ...]:
    """The effect of every member that can be told apart from its stage, in the order of stages and hotkeys.

    Empty while there is too little to go by. The order of pathways within an outer step matters for the trend only.
    """
    table = _newest(table)
    num_pathways = len(table.losses_N)
    if num_pathways == 0 or len(table.members) > MEMBERS_MAX:
        return ()
    losses_N = _clipped(table)
    design = _design(table)
    gram_PP = _gram(design, np.ones(num_pathways))
    inverse_PP, rank = _inverse(gram_PP)
    freedom = num_pathways - rank
    if freedom < FREEDOM_MIN:
        return ()
    solution_P = inverse_PP @ _project(design, losses_N)
    residuals_N = losses_N - (solution_P[design.columns_NQ] * design.values_NQ).sum(axis=1)
    left_N = np.maximum(1.0 - _leverages(design, inverse_PP), _LEFT_MIN)
    covariance_PP = inverse_PP @ _gram(design, (residuals_N / left_N) ** 2) @ inverse_PP
    contrasts_MP, trips_M = _contrasts(table, design)
    effects_M = contrasts_MP @ solution_P
    errors_M = np.sqrt(np.maximum(np.einsum("mp,pq,mq->m", contrasts_MP, covariance_PP, contrasts_MP), 0.0))
    # A contrast that the projection on what was seen would change cannot be estimated.
    unseen_M = np.abs(contrasts_MP @ (inverse_PP @ gram_PP) - contrasts_MP).max(axis=1)
    can_tell_M = (unseen_M < _UNSEEN_MAX) & (trips_M >= TRIPS_MIN) & (errors_M > _ERROR_MIN)
    told = [int(member) for member in np.flatnonzero(can_tell_M)]
    if not told:
        return ()
    critical = _t_of_normal(NormalDist().inv_cdf(1.0 - (1.0 - CONFIDENCE) / (2.0 * len(told))), freedom)
    found = [
        MemberEffect(
            hotkey=table.members[member][1],
            stage_index=table.members[member][0],
            num_pathways=int(trips_M[member]),
            effect=float(effects_M[member]),
            standard_error=float(errors_M[member]),
            lower=float(effects_M[member] - critical * errors_M[member]),
            upper=float(effects_M[member] + critical * errors_M[member]),
            p_value=1.0 - NormalDist().cdf(_normal_of_t(float(effects_M[member] / errors_M[member]), freedom)),
            effect_confirmed=_confirmed(table, member, residuals_N + effects_M[member], float(effects_M[member])),
        )
        for member in told
    ]
    return tuple(sorted(found, key=lambda found: (found.stage_index, found.hotkey)))


# --- the regression ---------------------------------------------------------------------------------------------------


def _newest(table: PathwayTable) -> PathwayTable:
    cut = slice(-PATHWAYS_MAX, None)
    return PathwayTable(table.members, table.paths_NS[cut], table.losses_N[cut], table.outer_steps_N[cut])


def _clipped(table: PathwayTable) -> Floats:
    """Losses relative to the median of their outer step, none further off than `CLIP_SPREADS`."""
    losses_N = np.clip(table.losses_N, -LOSS_MAX, LOSS_MAX)
    for outer_step in np.unique(table.outer_steps_N):
        own = table.outer_steps_N == outer_step
        off = losses_N[own] - np.median(losses_N[own])
        limit = CLIP_SPREADS * _MAD_TO_SPREAD * float(np.median(np.abs(off)))
        losses_N[own] = np.clip(off, -limit, limit)
    return losses_N


def _design(table: PathwayTable) -> _Design:
    """Columns: level, slope and curve of each outer step as far as it has them, then one for each member."""
    num_pathways, num_stages = table.paths_NS.shape
    columns_NQ = np.zeros((num_pathways, TREND_TERMS_MAX + num_stages), dtype=np.int64)
    values_NQ = np.zeros((num_pathways, TREND_TERMS_MAX + num_stages))
    num_columns = 0
    for outer_step in np.unique(table.outer_steps_N):
        rows = np.flatnonzero(table.outer_steps_N == outer_step)
        time = np.linspace(-1.0, 1.0, len(rows)) if len(rows) > 1 else np.zeros(1)
        terms = (np.ones(len(rows)), time, time**2 - 1.0 / 3.0)
        for place, term in enumerate(terms[: 1 + min(TREND_TERMS_MAX - 1, len(rows) // TREND_PATHWAYS)]):
            columns_NQ[rows, place] = num_columns
            values_NQ[rows, place] = term
            num_columns += 1
    columns_NQ[:, TREND_TERMS_MAX:] = num_columns + table.paths_NS
    values_NQ[:, TREND_TERMS_MAX:] = 1.0
    return _Design(columns_NQ, values_NQ, num_columns + len(table.members), num_columns)


def _gram(design: _Design, weights_N: Floats) -> Floats:
    """Xᵀ diag(weights) X."""
    num = design.num_columns
    total = np.zeros(num * num)
    width = design.columns_NQ.shape[1]
    for first in range(width):
        for second in range(width):
            places_N = design.columns_NQ[:, first] * num + design.columns_NQ[:, second]
            values_N = design.values_NQ[:, first] * design.values_NQ[:, second] * weights_N
            total += np.bincount(places_N, weights=values_N, minlength=num * num)
    return total.reshape(num, num)


def _project(design: _Design, values_N: Floats) -> Floats:
    """Xᵀ values."""
    weights_NQ = design.values_NQ * values_N[:, None]
    sums_P: Floats = np.bincount(
        design.columns_NQ.ravel(), weights=weights_NQ.ravel(), minlength=design.num_columns
    ).astype(np.float64)
    return sums_P


def _inverse(gram_PP: Floats) -> tuple[Floats, int]:
    """Pseudo-inverse and rank: levels and members of a stage say the same thing twice, which contrasts don't mind."""
    values_P, vectors_PP = np.linalg.eigh(gram_PP)
    keep_P = values_P > _RANK_TOLERANCE * values_P[-1]
    kept_PR = vectors_PP[:, keep_P]
    return (kept_PR / values_P[keep_P]) @ kept_PR.T, int(keep_P.sum())


def _leverages(design: _Design, inverse_PP: Floats) -> Floats:
    """The diagonal of the hat matrix, one value a pathway."""
    leverages_N = np.zeros(len(design.columns_NQ))
    width = design.columns_NQ.shape[1]
    for first in range(width):
        for second in range(width):
            entries_N = inverse_PP[design.columns_NQ[:, first], design.columns_NQ[:, second]]
            leverages_N += entries_N * design.values_NQ[:, first] * design.values_NQ[:, second]
    return leverages_N


def _contrasts(table: PathwayTable, design: _Design) -> tuple[Floats, Integers]:
    """For each member: itself minus its stage, members weighted by their trips; and everybody's trips."""
    num_members = len(table.members)
    trips_M = np.bincount(table.paths_NS.ravel(), minlength=num_members)
    stages_M = np.array([stage for stage, _ in table.members], dtype=np.int64)
    contrasts_MP = np.zeros((num_members, design.num_columns))
    for stage in np.unique(stages_M):
        own = np.flatnonzero(stages_M == stage)
        shares = trips_M[own] / max(1, int(trips_M[own].sum()))
        contrasts_MP[np.ix_(own, design.first_member + own)] = np.eye(len(own)) - shares
    return contrasts_MP, trips_M


# --- the guard against single liars -----------------------------------------------------------------------------------


def _confirmed(table: PathwayTable, member: int, views_N: Floats, effect: float) -> float:
    """The least middle view of a member, over the other stages; `views_N` are its trips' losses less all that the
    others explain. Where a stage has a single partner there is nobody to compare with, and it is passed over."""
    stage = table.members[member][0]
    rows = np.flatnonzero(table.paths_NS[:, stage] == member)
    least = effect
    for other in range(table.paths_NS.shape[1]):
        partners_N = table.paths_NS[rows, other]
        counts_M = np.bincount(partners_N, minlength=len(table.members))
        partners = np.flatnonzero(counts_M >= _PAIR_TRIPS_MIN)
        if other == stage or len(partners) < 2:
            continue
        sums_M = np.bincount(partners_N, weights=views_N[rows], minlength=len(table.members))
        views = np.sort(sums_M[partners] / counts_M[partners])
        least = min(least, float(views[(len(views) - 1) // 2]))
    return least


# --- Student's t by the normal distribution ---------------------------------------------------------------------------


def _t_of_normal(normal: float, freedom: int) -> float:
    """Student's quantile that belongs to a normal one (Cornish and Fisher, two terms)."""
    first = (normal**3 + normal) / (4.0 * freedom)
    second = (5.0 * normal**5 + 16.0 * normal**3 + 3.0 * normal) / (96.0 * freedom**2)
    return normal + first + second


def _normal_of_t(t: float, freedom: int) -> float:
    """The normal value as far out as a Student's one (Wallace's simple form)."""
    return t * (1.0 - 1.0 / (4.0 * freedom)) / float(np.sqrt(1.0 + t * t / (2.0 * freedom)))
