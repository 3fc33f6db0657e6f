"""Epochs on a whole chain: when they run, what they pay, who may validate."""

from itertools import pairwise

from chain_kit import CONFIG, Lab, address

from orion.devnet.epoch import ALPHA_PER_BLOCK

ALICE, BOB, CHARLIE = "//Alice", "//Bob", "//Charlie"
TAO = 10**9


def _validating(weights: list[int]) -> Lab:
    """Alice validates subnet 1 and has given Bob and Charlie these weights."""
    lab = Lab()
    lab.subnet(BOB, CHARLIE)
    lab.stake(ALICE, 1, 100)
    lab.blocks(CONFIG.tempo)
    args = {"netuid": 1, "dests": [1, 2], "weights": weights, "version_key": 0}
    assert lab.run("//Alice//hotkey", "set_weights", **args) == "ok"
    return lab


def _alpha(lab: Lab) -> dict[str, int]:
    return {uri: lab.get("TotalHotkeyAlpha", address(f"{uri}//hotkey"), 1) for uri in (ALICE, BOB, CHARLIE)}


def test_an_epoch_runs_every_tempo_blocks() -> None:
    lab = Lab()
    netuid = lab.subnet()
    ran = []
    for _ in range(4 * CONFIG.tempo):
        before = lab.get("SubnetEpochIndex", netuid)
        lab.blocks()
        if lab.get("SubnetEpochIndex", netuid) > before:
            ran.append(lab.chain.head.number)
        else:
            assert lab.get("BlocksSinceLastStep", netuid) > 0
    assert [later - earlier for earlier, later in pairwise(ran)] == [CONFIG.tempo] * 3


def test_the_pay_of_an_epoch_is_split_as_documented() -> None:
    lab = _validating([1, 3])
    index = lab.get("SubnetEpochIndex", 1)
    while lab.get("SubnetEpochIndex", 1) == index:
        before = _alpha(lab)
        lab.blocks()
    paid = {uri: alpha - before[uri] for uri, alpha in _alpha(lab).items()}
    total = CONFIG.tempo * ALPHA_PER_BLOCK
    cut = total * 11_796 // 65_535
    for_miners = (total - cut) / 2
    assert abs(paid[BOB] - for_miners / 4) < TAO / 1000
    assert abs(paid[CHARLIE] - for_miners * 3 / 4) < TAO / 1000
    assert abs(paid[ALICE] - cut - for_miners) < TAO / 1000
    assert sum(paid.values()) <= total
    emission = lab.get("Emission", 1)
    assert [abs(emission[uid] - paid[uri]) <= 2 for uid, uri in ((1, BOB), (2, CHARLIE))] == [True, True]
    assert lab.get("Incentive", 1)[2] > 2.9 * lab.get("Incentive", 1)[1] > 0


def test_incentive_of_the_owners_slot_is_paid_to_nobody() -> None:
    lab = _validating([1, 3])
    args = {"netuid": 1, "dests": [0], "weights": [1], "version_key": 0}
    lab.blocks(CONFIG.weights_rate_limit)
    assert lab.run("//Alice//hotkey", "set_weights", **args) == "ok"
    index = lab.get("SubnetEpochIndex", 1)
    while lab.get("SubnetEpochIndex", 1) == index:
        before = _alpha(lab)
        lab.blocks()
    assert lab.get("Incentive", 1)[0] == 65_535
    total = CONFIG.tempo * ALPHA_PER_BLOCK
    paid = sum(_alpha(lab).values()) - sum(before.values())
    assert paid < total * 0.6, "the miners' half is gone"


def test_nothing_is_paid_before_the_start() -> None:
    lab = Lab()
    lab.run(ALICE, "register_network", hotkey=address("//Alice//hotkey"))
    lab.blocks(3 * CONFIG.tempo)
    assert lab.get("SubnetEpochIndex", 1) >= 2
    assert lab.get("TotalHotkeyAlpha", address("//Alice//hotkey"), 1) == 0


def test_permits_follow_stake() -> None:
    lab = Lab()
    lab.subnet(BOB, CHARLIE)
    assert lab.root("sudo_set_max_allowed_validators", netuid=1, max_allowed_validators=1) == "ok"
    lab.stake(BOB, 1, 100)
    lab.blocks(CONFIG.tempo)
    assert lab.get("ValidatorPermit", 1) == [False, True, False]
    lab.stake(CHARLIE, 1, 300)
    lab.blocks(CONFIG.tempo)
    assert lab.get("ValidatorPermit", 1) == [False, False, True]


def test_weights_end_with_the_neuron_they_were_for() -> None:
    lab = _validating([1, 3])
    lab.run("//Dave", "burned_register", netuid=1, hotkey=address("//Dave//hotkey"))
    lab.blocks(2 * CONFIG.immunity_period)
    # Bob's slot earns less than Charlie's; with Dave the subnet is full, so Eve would take Dave's, who earns nothing.
    assert lab.run("//Eve", "burned_register", netuid=1, hotkey=address("//Eve//hotkey")) == "ok"
    assert lab.get("Keys", 1, 3) == address("//Eve//hotkey")
    lab.root("sudo_set_weights_set_rate_limit", netuid=1, weights_set_rate_limit=0)
    to_eve = {"netuid": 1, "dests": [3], "weights": [1], "version_key": 0}
    assert lab.run("//Alice//hotkey", "set_weights", **to_eve) == "ok"
    lab.blocks(CONFIG.tempo)
    assert lab.get("Incentive", 1)[3] == 65_535
    lab.root("sudo_set_immunity_period", netuid=1, immunity_period=0)
    # Bob and Charlie earned nothing in the last epoch; Bob registered first.
    assert lab.run("//Ferdie", "burned_register", netuid=1, hotkey=address("//Ferdie//hotkey")) == "ok"
    assert lab.get("Keys", 1, 1) == address("//Ferdie//hotkey")
    lab.blocks(CONFIG.tempo)
    assert lab.get("Incentive", 1)[1] == 0


def test_no_setting_stops_the_chain() -> None:
    """Everything that the root may set, at both ends of its range, then epochs with weights."""
    lab = _validating([1, 3])
    settings = [
        ("sudo_set_kappa", "kappa", 65_535),
        ("sudo_set_bonds_moving_average", "bonds_moving_average", (1 << 64) - 1),
        ("sudo_set_bonds_penalty", "bonds_penalty", 65_535),
        ("sudo_set_max_allowed_validators", "max_allowed_validators", 4),
        ("sudo_set_activity_cutoff_factor", "factor_milli", (1 << 32) - 1),
        ("sudo_set_tempo", "tempo", 65_535),
        ("sudo_set_commit_reveal_weights_interval", "interval", (1 << 64) - 1),
    ]
    for call, name, high in settings:
        for value in (0, high, 1):
            assert lab.root(call, netuid=1, **{name: value}) == "ok", (call, value)
            lab.blocks(2)
    assert lab.get("SubnetEpochIndex", 1) > 5
