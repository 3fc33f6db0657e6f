"""`orion status --miner`: what one miner is paid, and why, as a table for people."""

from rich.console import Console
from rich.table import Table

from orion.cli.chain_access import Subnet, open_chain
from orion.common.ids import Hotkey
from orion.common.net.http import HttpClient
from orion.common.net.orchestrator_client import OrchestratorClient
from orion.common.protocol.pay import MinerPay, PaidStep


async def fetch_pay(orchestrator_url: str, hotkey: Hotkey, subnet: Subnet | None) -> tuple[MinerPay, float | None]:
    """A miner's pay, and its incentive on the chain where one is named (0 for who has no slot).

    Raises RefusedError for a hotkey that the run does not know, TransportError, ChainError.
    """
    async with HttpClient() as http:
        pay = await OrchestratorClient.miner(http, orchestrator_url, hotkey)
    if subnet is None:
        return pay, None
    async with open_chain(subnet) as chain:
        neuron = (await chain.metagraph()).neuron_of(hotkey)
    return pay, neuron.incentive if neuron is not None else 0.0


def print_pay(console: Console, pay: MinerPay, incentive: float | None) -> None:
    """For people."""
    table = Table(title=f"{pay.hotkey}, outer steps {pay.window_start} to {pay.outer_step}")
    for name in (
        "step",
        "stage",
        "credited",
        "committed",
        "receipts",
        "one-sided",
        "merged",
        "reduced",
        "TFLOPs",
    ):
        table.add_column(name, justify="right")
    table.add_column("checks")
    for step in pay.steps:
        table.add_row(*_cells(step))
    console.print(table)
    console.print(f"score {pay.score:.6g}", highlight=False)
    console.print(_verification(pay), highlight=False)
    if pay.paid_again_from is not None:
        console.print(
            f"a failed check stands: nothing is paid before outer step {pay.paid_again_from}", highlight=False
        )
    for given in pay.scores:
        console.print(
            f"validator {given.validator}: score {given.score:.6g}, weight {given.weight:.4f} "
            f"(outer step {given.outer_step}, ledger entry {given.sequence})",
            highlight=False,
        )
    if incentive is not None:
        console.print(f"incentive on the chain {incentive:.4f}", highlight=False)


def _verification(pay: MinerPay) -> str:
    """How far the work was verified, and how much waits for it."""
    verified = (
        "no replay of a whole outer step has passed yet"
        if pay.verified_outer_step is None
        else f"verified by a replay of the whole of outer step {pay.verified_outer_step}"
    )
    if pay.waiting_flops == 0 or pay.paid_again_from is not None:
        return verified
    share = pay.waiting_flops / pay.counted_flops
    return f"{verified}; {share:.0%} of the work waits for that and counts × {pay.unverified_factor:g} until then"


def _cells(step: PaidStep) -> list[str]:
    merge = step.merge
    checks = [
        f"{record.verdict.subject} {'passed' if record.verdict.passed else 'FAILED: ' + record.verdict.reason}"
        for record in step.verdicts
    ]
    if step.waiting:
        checks.append("waits for verification")
    if step.num_contradictions:
        checks.append(f"{step.num_contradictions} contradicting receipts")
    return [
        str(step.outer_step),
        "" if step.stage_index is None else str(step.stage_index),
        str(step.num_credited),
        str(step.num_committed),
        str(step.num_receipts),
        str(step.num_receipts - step.num_matched),
        "…" if merge is None else f"{merge.num_merged}/{merge.num_settled}" + (" late" if merge.age else ""),
        "…" if merge is None else f"{merge.num_agreed}/{merge.num_asked}",
        f"{step.counted_flops / 1e12:.4g}",
        "; ".join(checks),
    ]
