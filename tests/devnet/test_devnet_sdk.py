"""The unmodified SDK against the development chain, over a real websocket."""

import asyncio

import bittensor as bt
import pytest
from devnet_kit import ALICE, BOB, CHARLIE, DAVE, as_root, register, start_subnet, succeed

storage = bt.storage.SubtensorModule


async def test_a_subnet_from_registration_to_incentive(devnet_url: str) -> None:
    async with bt.Subtensor(devnet_url) as subtensor:
        netuid = await start_subnet(subtensor)
        succeed(await subtensor.execute(bt.ServeAxon(netuid=netuid, ip="127.0.0.2", port=8091), BOB))
        await subtensor.wait_for_epoch(netuid)  # gives Alice her permit
        await subtensor.wait_for_block()
        assert (
            succeed(await subtensor.execute(bt.SetWeights(netuid=netuid, weights={1: 0.25, 2: 0.75}), ALICE))[0]
            == "WeightsSet"
        )
        await subtensor.wait_for_epoch(netuid)
        await subtensor.wait_for_block()
        graph = await subtensor.subnets.metagraph(netuid)
        alice, bob, charlie = graph.neurons
        assert [neuron.hotkey for neuron in graph.neurons] == [w.hotkey.ss58_address for w in (ALICE, BOB, CHARLIE)]
        assert alice.validator_permit
        assert alice.dividends == pytest.approx(1, abs=1e-4)
        assert bob.incentive == pytest.approx(0.25, abs=1e-3)
        assert charlie.incentive == pytest.approx(0.75, abs=1e-3)
        assert bob.axon == "127.0.0.2:8091"
        assert charlie.total_stake.rao > bob.total_stake.rao > 0
        weights = await subtensor.weights.weights(netuid=netuid)
        assert weights[0] == pytest.approx({1: 0.25, 2: 0.75}, abs=1e-4)


async def test_refusals_have_the_real_chains_names(devnet_url: str) -> None:
    async with bt.Subtensor(devnet_url) as subtensor:
        netuid = await start_subnet(subtensor)

        def error_of(result: bt.ExtrinsicResult) -> str:
            assert not result.success
            assert result.error is not None
            return str(result.error.name)

        axon = bt.ServeAxon(netuid=netuid, ip="127.0.0.1", port=8091)
        set_weights = bt.calls.SubtensorModule.set_mechanism_weights(
            netuid=netuid, mecid=0, dests=[0, 1], weights=[1, 1], version_key=0
        )
        assert error_of(await register(subtensor, BOB, netuid)) == "HotKeyAlreadyRegisteredInSubNet"
        assert error_of(await register(subtensor, DAVE, 99)) == "SubnetNotExists"
        assert error_of(await subtensor.execute(axon, BOB)) == "InvalidIpAddress"
        assert error_of(await subtensor.execute(axon, DAVE)) == "HotKeyNotRegisteredInNetwork"
        assert (
            error_of(await subtensor.submit_call(set_weights, DAVE, signer="hotkey")) == "HotKeyNotRegisteredInSubNet"
        )
        await subtensor.wait_for_block(await subtensor.block() + 4)
        assert error_of(await subtensor.submit_call(set_weights, BOB, signer="hotkey")) == "NeuronNoValidatorPermit"
        assert (
            error_of(await subtensor.execute(bt.StartCall(netuid=netuid), ALICE))
            == "FirstEmissionBlockNumberAlreadySet"
        )
        not_implemented = bt.calls.SubtensorModule.root_register(hotkey=BOB.hotkey.ss58_address)
        assert error_of(await subtensor.submit_call(not_implemented, BOB)) == "CallFiltered"


async def test_rate_limit_is_found_before_signing(devnet_url: str) -> None:
    async with bt.Subtensor(devnet_url) as subtensor:
        netuid = await start_subnet(subtensor)
        succeed(await as_root(subtensor, bt.calls.AdminUtils.sudo_set_weights_set_rate_limit(netuid, 1000)))
        with pytest.raises(bt.ChainError, match="the rate limit is 1000 blocks"):
            await subtensor.execute(bt.SetWeights(netuid=netuid, weights={1: 1.0}), ALICE)


async def test_timelocked_weights_are_kept(devnet_url: str) -> None:
    async with bt.Subtensor(devnet_url) as subtensor:
        netuid = await start_subnet(subtensor)
        # An epoch of many blocks: a short one may reveal the commitment before it is looked at.
        succeed(await as_root(subtensor, bt.calls.AdminUtils.sudo_set_tempo(netuid, 1000)))
        switch = bt.SetHyperparameter(netuid=netuid, name="commit_reveal_weights_enabled", value=True)
        succeed(await subtensor.execute(switch, ALICE))
        result = await subtensor.execute(bt.SetWeights(netuid=netuid, weights={1: 1.0}), ALICE)
        assert succeed(result)[0] == "TimelockedWeightsCommitted"
        (queue,) = (await subtensor.weights.timelocked_weight_commits(netuid=netuid)).values()
        assert [commit["hotkey"] for commit in queue] == [ALICE.hotkey.ss58_address]
        assert queue[0]["reveal_round"] == result.data["reveal_round"]


async def test_owner_and_root_set_what_is_theirs(devnet_url: str) -> None:
    async with bt.Subtensor(devnet_url) as subtensor:
        netuid = await start_subnet(subtensor)
        tempo = bt.calls.AdminUtils.sudo_set_tempo(netuid, 7)
        assert not (await subtensor.submit_call(tempo, BOB)).success
        assert not (await subtensor.submit_call(tempo, ALICE)).success, "the owner's tempo has the real chain's bounds"
        succeed(await as_root(subtensor, tempo))
        kept = await subtensor.execute(bt.SetHyperparameter(netuid=netuid, name="min_allowed_weights", value=3), ALICE)
        succeed(kept)
        found = await subtensor.subnets.subnet_hyperparameters(netuid=netuid)
        assert found is not None
        assert (found["tempo"], found["min_allowed_weights"]) == (7, 3)


async def test_stake_goes_in_and_out_at_one_to_one(devnet_url: str) -> None:
    async with bt.Subtensor(devnet_url) as subtensor:
        netuid = await start_subnet(subtensor)
        before = (await subtensor.balances.balance(BOB.coldkey.ss58_address)).rao
        hotkey = BOB.hotkey.ss58_address
        succeed(await subtensor.execute(bt.AddStake(hotkey_ss58=hotkey, netuid=netuid, amount_tao=5), BOB))
        assert (await subtensor.balances.balance(BOB.coldkey.ss58_address)).rao == before - 5_000_000_000
        succeed(await subtensor.execute(bt.RemoveStake(hotkey_ss58=hotkey, netuid=netuid, amount_alpha=5), BOB))
        assert (await subtensor.balances.balance(BOB.coldkey.ss58_address)).rao == before


async def test_old_blocks_answer_and_future_ones_do_not(devnet_url: str) -> None:
    async with bt.Subtensor(devnet_url) as subtensor:
        await start_subnet(subtensor)
        assert await (await subtensor.at(0)).query(storage.NetworksAdded, [1]) is False
        assert await (await subtensor.at(await subtensor.block())).query(storage.NetworksAdded, [1]) is True
        with pytest.raises(bt.BittensorError):
            await (await subtensor.at(1_000_000)).query(storage.NetworksAdded, [1])


async def test_new_and_final_heads_are_told(devnet_url: str) -> None:
    async with bt.Subtensor(devnet_url) as subtensor:
        streams = [subtensor.blocks(finalized=finalized) for finalized in (False, True)]
        for stream in streams:
            numbers = [(await anext(stream)).number for _ in range(3)]
            assert numbers == list(range(numbers[0], numbers[0] + 3))
    # A stream that is left half way is ended in the background, even when its connection is closed: the SDK opens it
    # again for that, and nobody closes that one. A stream that is read to its end has nothing more to say.
    for stream in streams:
        async for _ in stream:
            pass


async def test_extrinsics_of_one_account_wait_together(devnet_url: str) -> None:
    async with bt.Subtensor(devnet_url) as subtensor:
        transfers = [bt.Transfer(dest_ss58=BOB.hotkey.ss58_address, amount_tao=1) for _ in range(5)]
        results = await asyncio.gather(*(subtensor.execute(transfer, ALICE) for transfer in transfers))
        assert all(result.success for result in results), [result.message for result in results]
        assert (await subtensor.balances.balance(BOB.hotkey.ss58_address)).tao == 5


async def test_a_shielded_registration_is_opened_and_applied(devnet_url: str) -> None:
    async with bt.Subtensor(devnet_url) as subtensor:
        netuid = await start_subnet(subtensor)
        result = await subtensor.execute(bt.BurnedRegister(netuid=netuid), DAVE)
        assert succeed(result)[:2] == ["Withdraw", "NeuronRegistered"]
        assert result.data["shielded"]
        assert await subtensor.neurons.uid(hotkey_ss58=DAVE.hotkey.ss58_address, netuid=netuid) == 3
    # One connection of the SDK counts nonces by itself and doesn't know of the one that was sealed.
    async with bt.Subtensor(devnet_url) as subtensor:
        again = await subtensor.execute(bt.BurnedRegister(netuid=netuid), DAVE)
        assert again.error is not None
        assert again.error.name == "HotKeyAlreadyRegisteredInSubNet"
