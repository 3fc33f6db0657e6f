"""A validator's score sheet: made from the ledger and the chain's slots, and made again by whoever doubts it. Pure."""

from collections.abc import Mapping

from orion.common.config import RunSpec
from orion.common.ids import Hotkey
from orion.common.ledger.scoring import scores
from orion.common.ledger.weights import chain_weights
from orion.common.protocol.records import Ledger, ScoreSheet, Share


def make_sheet(
    ledger: Ledger, spec: RunSpec, uids: Mapping[Hotkey, int], owner_uid: int | None, weight_max: float
) -> ScoreSheet:
    """Scores of everybody in the ledger's window, and the chain weights that follow from them."""
    earned = scores(ledger, spec)
    weights = chain_weights(earned, uids, owner_uid, spec.validation.burn_share, weight_max)
    scored_uids = {uids[hotkey] for hotkey in earned if hotkey in uids}
    return ScoreSheet(
        outer_step=ledger.outer_step,
        num_entries=ledger.num_entries,
        ledger_digest=ledger.digest,
        owner_uid=owner_uid,
        burned=0.0 if owner_uid is None or owner_uid in scored_uids else weights.get(owner_uid, 0.0),
        weight_max=weight_max,
        shares=tuple(
            Share(hotkey=hotkey, uid=uids[hotkey], score=score, weight=weights.get(uids[hotkey], 0.0))
            for hotkey, score in earned.items()
            if hotkey in uids
        ),
        without_slot=tuple(hotkey for hotkey in earned if hotkey not in uids),
    )


def weights_of(sheet: ScoreSheet) -> dict[int, float]:
    """The chain weights of a sheet: uid to share, those above 0."""
    weights = {share.uid: share.weight for share in sheet.shares if share.weight > 0}
    if sheet.owner_uid is not None and sheet.burned > 0:
        weights[sheet.owner_uid] = sheet.burned
    return dict(sorted(weights.items()))


def differences(sheet: ScoreSheet, ledger: Ledger, spec: RunSpec) -> list[str]:
    """How a sheet differs from the one that follows from the ledger which it names; empty when it is right.

    Which slots there were is taken from the sheet: that is the chain's to say.
    """
    found = []
    if (sheet.outer_step, sheet.num_entries, sheet.ledger_digest) != (
        ledger.outer_step,
        ledger.num_entries,
        ledger.digest,
    ):
        found.append(f"it was made from another ledger: {sheet.num_entries} entries with digest {sheet.ledger_digest}")
    uids = {share.hotkey: share.uid for share in sheet.shares}
    expected = make_sheet(ledger, spec, uids, sheet.owner_uid, sheet.weight_max)
    told = {share.hotkey: share for share in sheet.shares}
    right = {share.hotkey: share for share in expected.shares}
    for hotkey in sorted(told.keys() | right.keys()):
        if hotkey not in right:
            found.append(f"{hotkey} has a score, and has no work")
        elif told[hotkey].score != right[hotkey].score:
            found.append(f"the score of {hotkey} is {told[hotkey].score}, it should be {right[hotkey].score}")
        elif told[hotkey].weight != right[hotkey].weight:
            found.append(f"the weight of {hotkey} is {told[hotkey].weight}, it should be {right[hotkey].weight}")
    if sheet.burned != expected.burned:
        found.append(f"the owner's slot has {sheet.burned}, it should be {expected.burned}")
    if sheet.without_slot != expected.without_slot:
        found.append("it does not name all miners without a slot")
    return found
