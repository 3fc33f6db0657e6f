"""Each call's rules, in the real chain's order and with its names."""

import pytest
from bittensor.intents.hyperparameters import OWNER_HYPERPARAMETERS
from chain_kit import CONFIG, Lab, address

from orion.devnet.calls.serving import is_valid_address
from orion.devnet.calls.table import CALLS
from orion.devnet.stakes import hotkey_alpha, stake_of

TAO = 10**9
ALICE, BOB, CHARLIE, DAVE, EVE = "//Alice", "//Bob", "//Charlie", "//Dave", "//Eve"


def _hotkey(uri: str) -> str:
    return address(f"{uri}//hotkey")


def _issuance_is_right(lab: Lab) -> bool:
    """Whether the issuance is what accounts own and subnets hold."""
    free = sum(account["data"]["free"] for _, account in lab.chain.state.items("System.Account"))
    held = sum(rao for _, rao in lab.chain.state.items("SubnetTAO"))
    return bool(lab.get("Balances.TotalIssuance") == free + held == lab.get("TotalIssuance"))


class TestBalances:
    def test_transfers_move_exactly_what_they_say(self) -> None:
        lab = Lab()
        assert lab.run(ALICE, "transfer_keep_alive", "Balances", dest=address("//New"), value=3 * TAO) == "ok"
        assert (lab.free("//New"), lab.free(ALICE)) == (3 * TAO, CONFIG.endowment_rao - 3 * TAO)
        assert {event["event_id"] for event in lab.events()} >= {"NewAccount", "Endowed", "Transfer"}
        assert _issuance_is_right(lab)

    def test_what_cannot_be_paid_is_refused(self) -> None:
        lab = Lab()
        too_much = CONFIG.endowment_rao + 1
        transfer = "transfer_keep_alive"
        assert lab.run(ALICE, transfer, "Balances", dest=address(BOB), value=too_much) == "FundsUnavailable"
        assert lab.run(ALICE, transfer, "Balances", dest=address(BOB), value=CONFIG.endowment_rao) == "NotExpendable"
        assert lab.run(ALICE, transfer, "Balances", dest=address("//New"), value=499) == "BelowMinimum"
        assert lab.free(ALICE) == CONFIG.endowment_rao

    def test_an_account_may_be_emptied(self) -> None:
        lab = Lab()
        assert lab.run(EVE, "transfer_all", "Balances", dest=address(BOB), keep_alive=False) == "ok"
        assert lab.free(EVE) == 0
        assert lab.chain.next_nonce(address(EVE)) == 1, "its extrinsics don't become good again"
        assert _issuance_is_right(lab)

    def test_only_the_root_sets_balances(self) -> None:
        lab = Lab()
        assert lab.run(BOB, "force_set_balance", "Balances", who=address(EVE), new_free=5 * TAO) == "BadOrigin"
        assert lab.root("force_set_balance", "Balances", who=address(EVE), new_free=5 * TAO) == "ok"
        assert lab.free(EVE) == 5 * TAO
        assert _issuance_is_right(lab)

    def test_sums_that_do_not_fit_fail_alone(self) -> None:
        lab = Lab()
        before = lab.free(EVE)
        huge = {"who": address(EVE), "new_free": (1 << 64) - 1}
        assert lab.root("force_set_balance", "Balances", **huge) == "Overflow"
        assert lab.free(EVE) == before
        assert _issuance_is_right(lab)


class TestRegistration:
    def test_a_subnet_costs_and_belongs_to_who_made_it(self) -> None:
        lab = Lab()
        assert lab.run(BOB, "register_network", hotkey=_hotkey(BOB)) == "ok"
        assert lab.free(BOB) == CONFIG.endowment_rao - CONFIG.subnet_cost_rao
        assert (lab.get("SubnetOwner", 1), lab.get("Keys", 1, 0)) == (address(BOB), _hotkey(BOB))
        assert lab.run(BOB, "register_network", hotkey=_hotkey(BOB)) == "ok"
        assert lab.get("Keys", 2, 0) == _hotkey(BOB)
        assert lab.run(EVE, "register_network", hotkey=_hotkey(BOB)) == "NonAssociatedColdKey"
        assert _issuance_is_right(lab)

    def test_a_poor_account_makes_no_subnet(self) -> None:
        lab = Lab()
        lab.root("force_set_balance", "Balances", who=address(EVE), new_free=CONFIG.subnet_cost_rao)
        assert lab.run(EVE, "register_network", hotkey=_hotkey(EVE)) == "CannotAffordLockCost"

    def test_a_slot_is_paid_for_once(self) -> None:
        lab = Lab()
        netuid = lab.subnet()
        before = lab.free(BOB)
        assert lab.run(BOB, "burned_register", netuid=netuid, hotkey=_hotkey(BOB)) == "ok"
        assert before - lab.free(BOB) == CONFIG.burn_rao
        assert lab.get("Uids", netuid, _hotkey(BOB)) == 1
        again = lab.run(BOB, "burned_register", netuid=netuid, hotkey=_hotkey(BOB))
        assert again == "HotKeyAlreadyRegisteredInSubNet"
        assert before - lab.free(BOB) == CONFIG.burn_rao
        assert _issuance_is_right(lab)

    @pytest.mark.parametrize(
        ("netuid", "error"), [(0, "RegistrationNotPermittedOnRootSubnet"), (77, "SubnetNotExists")]
    )
    def test_only_subnets_are_registered_in(self, netuid: int, error: str) -> None:
        assert Lab().run(BOB, "burned_register", netuid=netuid, hotkey=_hotkey(BOB)) == error

    def test_the_owner_can_close_registration(self) -> None:
        lab = Lab()
        netuid = lab.subnet()
        closing = {"netuid": netuid, "registration_allowed": False}
        assert lab.run(ALICE, "sudo_set_network_registration_allowed", "AdminUtils", **closing) == "ok"
        assert lab.run(BOB, "burned_register", netuid=netuid, hotkey=_hotkey(BOB)) == "SubNetRegistrationDisabled"

    def test_a_block_takes_only_so_many(self) -> None:
        lab = Lab()
        netuid = lab.subnet()
        assert lab.root("sudo_set_max_registrations_per_block", netuid=netuid, max_registrations_per_block=1) == "ok"
        for uri in (BOB, CHARLIE):
            lab.send(uri, "SubtensorModule", "burned_register", netuid=netuid, hotkey=_hotkey(uri))
        lab.blocks()
        assert lab.outcomes() == ["ok", "TooManyRegistrationsThisBlock"]
        assert lab.run(CHARLIE, "burned_register", netuid=netuid, hotkey=_hotkey(CHARLIE)) == "ok"

    def test_a_full_subnet_gives_away_the_slot_that_earns_least(self) -> None:
        lab = Lab()
        netuid = lab.subnet(BOB, CHARLIE, DAVE)
        registering = {"netuid": netuid, "hotkey": _hotkey(EVE)}
        # The three are immune for four blocks, the owner for ever; Bob registered first.
        assert lab.run(EVE, "burned_register", **registering) == "NoNeuronIdAvailable"
        lab.blocks(2)
        assert lab.run(f"{BOB}//hotkey", "serve_axon", **_axon(netuid)) == "ok"
        assert lab.run(EVE, "burned_register", **registering) == "ok"
        assert lab.get("Uids", netuid, _hotkey(EVE)) == 1
        assert lab.get("Uids", netuid, _hotkey(BOB)) is None
        assert not lab.chain.state.has("Axons", netuid, _hotkey(BOB))
        assert lab.get("SubnetworkN", netuid) == CONFIG.max_uids

    def test_a_subnet_is_started_once_by_its_owner(self) -> None:
        lab = Lab()
        lab.run(ALICE, "register_network", hotkey=_hotkey(ALICE))
        assert lab.run(BOB, "start_call", netuid=1) == "NotSubnetOwner"
        assert lab.stake(ALICE, 1, 5) == "SubtokenDisabled"
        assert lab.run(ALICE, "start_call", netuid=1) == "ok"
        assert lab.run(ALICE, "start_call", netuid=1) == "FirstEmissionBlockNumberAlreadySet"
        assert lab.stake(ALICE, 1, 5) == "ok"


def _axon(netuid: int, **changes: int) -> dict[str, int]:
    axon = {"netuid": netuid, "version": 1, "ip": 0x0A010203, "port": 8091, "ip_type": 4, "protocol": 4}
    return {**axon, "placeholder1": 0, "placeholder2": 0, **changes}


class TestServing:
    def test_an_axon_is_kept_as_it_was_sent(self) -> None:
        lab = Lab()
        netuid = lab.subnet(BOB)
        lab.send(f"{BOB}//hotkey", "SubtensorModule", "serve_axon", **_axon(netuid))
        lab.blocks()
        assert lab.outcomes() == ["ok"]
        axon = lab.get("Axons", netuid, _hotkey(BOB))
        assert (axon["ip"], axon["port"], axon["block"]) == (0x0A010203, 8091, lab.chain.head.number)

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"netuid": 9}, "HotKeyNotRegisteredInNetwork"),
            ({"ip_type": 5}, "InvalidIpType"),
            ({"ip": 0x7F000001}, "InvalidIpAddress"),
            ({"ip": 0xFFFFFFFF}, "InvalidIpAddress"),
            ({"port": 0}, "InvalidPort"),
        ],
    )
    def test_what_is_no_address_is_refused(self, changes: dict[str, int], error: str) -> None:
        lab = Lab()
        netuid = lab.subnet(BOB)
        assert lab.run(f"{BOB}//hotkey", "serve_axon", **{**_axon(netuid), **changes}) == error

    def test_axons_change_only_so_often(self) -> None:
        lab = Lab()
        netuid = lab.subnet(BOB)
        hotkey = f"{BOB}//hotkey"
        assert lab.run(hotkey, "serve_axon", **_axon(netuid)) == "ok"
        assert lab.run(hotkey, "serve_axon", **_axon(netuid)) == "ServingRateLimitExceeded"
        lab.blocks(CONFIG.serving_rate_limit - 2)
        assert lab.run(hotkey, "serve_axon", **_axon(netuid, ip=0, port=1)) == "ok", "the SDK resets an axon like this"

    def test_loopback_other_than_the_first_address_is_good(self) -> None:
        assert is_valid_address(0x7F000002, 4)
        assert is_valid_address(1 << 64, 6)
        assert not is_valid_address(1, 6)


class TestWeights:
    @pytest.fixture
    def lab(self) -> Lab:
        """Alice validates in subnet 1 with two miners, and may set weights now."""
        lab = Lab()
        lab.subnet(BOB, CHARLIE)
        lab.stake(ALICE, 1, 100)
        lab.blocks(CONFIG.tempo)
        assert lab.get("ValidatorPermit", 1) == [True, False, False]
        return lab

    def _set(self, lab: Lab, uri: str = ALICE, **changes: object) -> str:
        args = {"netuid": 1, "dests": [1, 2], "weights": [100, 50], "version_key": 0, **changes}
        return lab.run(f"{uri}//hotkey", "set_weights", **args)

    def test_weights_are_upscaled_and_zeros_left_out(self, lab: Lab) -> None:
        assert self._set(lab, dests=[2, 0, 1], weights=[50, 0, 100]) == "ok"
        assert lab.get("Weights", 1, 0) == [(2, 32_767), (1, 65_535)]
        assert lab.get("LastUpdate", 1)[0] == lab.chain.head.number

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"netuid": 0}, "CanNotSetRootNetworkWeights"),
            ({"netuid": 5}, "MechanismDoesNotExist"),
            ({"weights": [1]}, "WeightVecNotEqualSize"),
            ({"dests": [0, 1, 2, 3], "weights": [1] * 4}, "UidsLengthExceedUidsInSubNet"),
            ({"uri": DAVE}, "HotKeyNotRegisteredInSubNet"),
            ({"uri": BOB}, "NeuronNoValidatorPermit"),
            ({"dests": [1, 1]}, "DuplicateUids"),
            ({"dests": [1, 3]}, "UidVecContainInvalidOne"),
        ],
    )
    def test_refusals(self, lab: Lab, changes: dict[str, object], error: str) -> None:
        assert self._set(lab, **{"uri": ALICE, **changes}) == error  # type: ignore[arg-type]

    def test_the_commit_reveal_switch_comes_first(self, lab: Lab) -> None:
        lab.run(ALICE, "sudo_set_commit_reveal_weights_enabled", "AdminUtils", netuid=1, enabled=True)
        assert self._set(lab, weights=[1]) == "CommitRevealEnabled"

    def test_settings_bound_weights(self, lab: Lab) -> None:
        lab.root("sudo_set_weights_version_key", netuid=1, weights_version_key=7)
        assert self._set(lab, version_key=6) == "IncorrectWeightVersionKey"
        lab.root("sudo_set_min_allowed_weights", netuid=1, min_allowed_weights=3)
        assert self._set(lab, version_key=7) == "WeightVecLengthIsLow"
        lab.root("sudo_set_min_allowed_weights", netuid=1, min_allowed_weights=1)
        lab.root("sudo_set_stake_threshold", min_stake=101 * TAO)
        assert self._set(lab, version_key=8, uri=BOB) == "NotEnoughStakeToSetWeights"
        assert self._set(lab, version_key=8) == "ok", "the owner's cut has brought Alice above the threshold"

    def test_weights_are_set_only_so_often(self, lab: Lab) -> None:
        assert self._set(lab) == "ok"
        assert self._set(lab) == "SettingWeightsTooFast"
        lab.blocks(CONFIG.weights_rate_limit - 2)
        assert self._set(lab) == "ok"

    def test_who_weighs_only_itself_needs_no_permit(self, lab: Lab) -> None:
        assert self._set(lab, uri=BOB, dests=[1], weights=[9]) == "ok"

    def _commit(self, lab: Lab, commit: bytes, **changes: object) -> str:
        args = {"netuid": 1, "commit": commit, "reveal_round": 5, "commit_reveal_version": 4, **changes}
        return lab.run(f"{ALICE}//hotkey", "commit_timelocked_weights", **args)

    def test_commits_are_kept_bounded_and_forgotten(self, lab: Lab) -> None:
        assert self._commit(lab, b"\xff\x00") == "CommitRevealDisabled"
        lab.run(ALICE, "sudo_set_commit_reveal_weights_enabled", "AdminUtils", netuid=1, enabled=True)
        lab.root("sudo_set_weights_set_rate_limit", netuid=1, weights_set_rate_limit=0)
        lab.root("sudo_set_tempo", netuid=1, tempo=50)
        assert self._commit(lab, b"\xff\x00", commit_reveal_version=3) == "IncorrectCommitRevealVersion"
        assert [self._commit(lab, bytes([255, number])) for number in range(10)] == ["ok"] * 10
        assert self._commit(lab, b"\xff\x77") == "TooManyUnrevealedCommits"
        ((_, queue),) = lab.chain.state.items("TimelockedWeightCommits", 1)
        assert queue[0][0] == _hotkey(ALICE)
        assert queue[0][2] == "0xff00"
        lab.root("sudo_set_tempo", netuid=1, tempo=2)
        lab.blocks(6)
        assert lab.chain.state.items("TimelockedWeightCommits", 1) == []


class TestStaking:
    def test_stake_comes_back_whole(self) -> None:
        lab = Lab()
        netuid = lab.subnet(BOB)
        before = lab.free(BOB)
        assert lab.stake(BOB, netuid, 40) == "ok"
        assert before - lab.free(BOB) == 40 * TAO
        everything = {"hotkey": _hotkey(BOB), "netuid": netuid, "amount_unstaked": 40 * TAO}
        assert (
            lab.run(BOB, "remove_stake", **{**everything, "amount_unstaked": 40 * TAO + 1})
            == "NotEnoughStakeToWithdraw"
        )
        assert lab.run(BOB, "remove_stake", **everything) == "ok"
        assert lab.free(BOB) == before
        assert _issuance_is_right(lab)

    def test_rewards_are_shared_by_stake(self) -> None:
        lab = Lab()
        netuid = lab.subnet(BOB)
        for uri, amount in ((BOB, 30), (CHARLIE, 10)):
            args = {"hotkey": _hotkey(BOB), "netuid": netuid, "amount_staked": amount * TAO}
            assert lab.run(uri, "add_stake", **args) == "ok"
        lab.blocks(3 * CONFIG.tempo)
        state = lab.chain.state
        total = hotkey_alpha(state, _hotkey(BOB), netuid)
        shares = [stake_of(state, _hotkey(BOB), address(uri), netuid) for uri in (BOB, CHARLIE)]
        assert total >= 40 * TAO
        assert shares[0] == pytest.approx(total * 3 / 4, abs=2)
        assert sum(shares) <= total <= sum(shares) + 2

    def test_limits_and_amounts(self) -> None:
        lab = Lab()
        netuid = lab.subnet(BOB)
        args = {"hotkey": _hotkey(BOB), "netuid": netuid, "amount_staked": 5 * TAO, "allow_partial": False}
        assert lab.run(BOB, "add_stake_limit", **args, limit_price=TAO - 1) == "SlippageTooHigh"
        assert lab.run(BOB, "add_stake_limit", **args, limit_price=TAO) == "ok"
        small = {"hotkey": _hotkey(BOB), "netuid": netuid, "amount_staked": 1000}
        assert lab.run(BOB, "add_stake", **small) == "AmountTooLow"
        nobody = {"hotkey": address("//Nobody"), "netuid": netuid, "amount_staked": TAO}
        assert lab.run(BOB, "add_stake", **nobody) == "HotKeyAccountNotExists"

    def test_stake_moves_between_hotkeys(self) -> None:
        lab = Lab()
        netuid = lab.subnet(BOB)
        lab.stake(BOB, netuid, 10)
        move = {
            "origin_hotkey": _hotkey(BOB),
            "destination_hotkey": _hotkey(ALICE),
            "origin_netuid": netuid,
            "destination_netuid": netuid,
            "alpha_amount": 4 * TAO,
        }
        assert lab.run(BOB, "move_stake", **move) == "ok"
        assert lab.get("TotalHotkeyAlpha", _hotkey(BOB), netuid) == 6 * TAO
        assert lab.run(BOB, "unstake_all", hotkey=_hotkey(ALICE)) == "ok"
        assert _issuance_is_right(lab)


class TestSettings:
    def test_owner_root_and_others(self) -> None:
        lab = Lab()
        netuid = lab.subnet()
        owner_sets = {"pallet": "AdminUtils", "netuid": netuid}
        assert lab.run(BOB, "sudo_set_immunity_period", **owner_sets, immunity_period=9) == "BadOrigin"
        assert lab.run(ALICE, "sudo_set_immunity_period", **owner_sets, immunity_period=9) == "ok"
        assert lab.run(ALICE, "sudo_set_kappa", **owner_sets, kappa=9) == "BadOrigin"
        assert lab.root("sudo_set_kappa", netuid=netuid, kappa=9) == "ok"
        assert lab.run(ALICE, "sudo_set_tempo", **owner_sets, tempo=10) == "ValueNotInBounds"
        assert lab.root("sudo_set_max_allowed_validators", netuid=netuid, max_allowed_validators=999) == (
            "MaxValidatorsLargerThanMaxUIds"
        )
        assert (lab.get("ImmunityPeriod", netuid), lab.get("Kappa", netuid)) == (9, 9)

    def test_the_owner_calls_an_epoch(self) -> None:
        lab = Lab()
        netuid = lab.subnet()
        assert lab.root("sudo_set_tempo", netuid=netuid, tempo=1000) == "ok"
        before = lab.get("SubnetEpochIndex", netuid)
        assert lab.run(ALICE, "trigger_epoch", netuid=netuid) == "ok"
        assert lab.get("SubnetEpochIndex", netuid) == before + 1

    def test_every_setting_of_the_sdk_is_there(self) -> None:
        missing = {call for call, _ in OWNER_HYPERPARAMETERS.values() if ("AdminUtils", call) not in CALLS}
        assert missing == {"sudo_set_epoch_consensus"}, "spec 461 has no such call"


class TestNesting:
    def test_a_batch_is_all_or_nothing(self) -> None:
        lab = Lab()
        good = lab.call("Balances", "transfer_keep_alive", dest=address(BOB), value=TAO)
        bad = lab.call("Balances", "transfer_keep_alive", dest=address(BOB), value=CONFIG.endowment_rao * 2)
        before = lab.free(BOB)
        assert lab.run(ALICE, "batch_all", "Utility", calls=[good, bad]) == "FundsUnavailable"
        assert lab.free(BOB) == before
        assert lab.run(ALICE, "batch", "Utility", calls=[good, bad, good]) == "ok"
        assert lab.free(BOB) == before + TAO
        assert lab.run(ALICE, "force_batch", "Utility", calls=[good, bad, good]) == "ok"
        assert lab.free(BOB) == before + 3 * TAO
        assert [event["event_id"] for event in lab.events()][-2:] == ["BatchCompletedWithErrors", "ExtrinsicSuccess"]

    def test_a_failed_call_leaves_only_its_failure(self) -> None:
        lab = Lab()
        netuid = lab.subnet()
        lab.root("force_set_balance", "Balances", who=address(EVE), new_free=1000 * TAO)
        first = lab.call("SubtensorModule", "burned_register", netuid=netuid, hotkey=_hotkey(EVE))
        assert lab.run(EVE, "batch_all", "Utility", calls=[first, first]) == "HotKeyAlreadyRegisteredInSubNet"
        assert lab.get("Uids", netuid, _hotkey(EVE)) is None
        assert lab.free(EVE) == 1000 * TAO
        assert [event["event_id"] for event in lab.events()] == ["ExtrinsicSuccess", "ExtrinsicFailed"]

    def test_only_the_root_key_is_root(self) -> None:
        lab = Lab()
        call = lab.call("Balances", "force_set_balance", who=address(BOB), new_free=TAO)
        assert lab.run(BOB, "sudo", "Sudo", call=call) == "RequireSudo"

    def test_nesting_is_bounded(self) -> None:
        lab = Lab()
        call = lab.call("Balances", "transfer_keep_alive", dest=address(BOB), value=TAO)
        for _ in range(12):
            call = lab.call("Utility", "batch_all", calls=[call])
        assert lab.run(ALICE, "batch_all", "Utility", calls=[call]) == "CallFiltered"
