"""`orion register`: a wallet, what a slot costs, a question, and the slot. The only command that needs a coldkey."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bittensor
import bittensor_core
from rich.console import Console

from orion.common.errors import ConfigError
from orion.common.ids import Hotkey
from orion.common.net.bittensor_client import BittensorClient
from orion.common.net.chain import ChainError, ChainErrorCode
from orion.common.net.coldkey import RAO, Coldkey, balance_of, registration_cost, uid_of

FEE_RESERVE_RAO = RAO // 500
"""What must be left for the transaction itself: several times what one costs on finney."""


@dataclass(frozen=True, slots=True)
class RegisterOptions:
    """What the command line says."""

    network: str
    netuid: int
    fallbacks: tuple[str, ...]
    wallet_path: Path
    wallet: str
    hotkey: str
    has_password: bool
    """Whether a coldkey that is made now is encrypted."""
    password: str | None
    """Of the coldkey; None = it is asked for when it is needed."""


@dataclass(frozen=True, slots=True)
class Registration:
    """What `orion register --json` prints. Amounts are TAO."""

    network: str
    netuid: int
    wallet: str
    hotkey: str
    coldkey: str
    uid: int
    was_registered: bool
    """Whether the hotkey had its slot already; then nothing was spent."""
    balance_tao: float
    """Before."""
    cost_tao: float


async def register(options: RegisterOptions, console: Console, confirm: Callable[[str], bool]) -> Registration | None:
    """Registers the wallet's hotkey; None when the answer to the question was no.

    Raises ConfigError when the wallet lacks what is needed, ChainError (BALANCE_TOO_LOW with what is missing, …),
    TransportError.
    """
    wallet = find_or_make_wallet(options, console)
    has_public = _public_part(options.wallet_path / options.wallet / "hotkeys" / options.hotkey).exists()
    hotkey = Hotkey((wallet.hotkeypub if has_public else wallet.hotkey).ss58_address)
    coldkey = str(wallet.coldkeypub.ss58_address)
    async with BittensorClient(options.network, options.fallbacks) as client:
        cost_rao = await registration_cost(client, options.netuid)
        balance_rao = await balance_of(client, coldkey)

        def outcome(uid: int, was_registered: bool) -> Registration:
            return Registration(
                network=options.network,
                netuid=options.netuid,
                wallet=str(options.wallet_path / options.wallet),
                hotkey=hotkey,
                coldkey=coldkey,
                uid=uid,
                was_registered=was_registered,
                balance_tao=balance_rao / RAO,
                cost_tao=0.0 if was_registered else cost_rao / RAO,
            )

        uid = await uid_of(client, options.netuid, hotkey)
        if uid is not None:
            console.print(f"{hotkey} is registered on subnet {options.netuid} already, with uid {uid}", highlight=False)
            return outcome(uid, was_registered=True)
        console.print(f"hotkey   {hotkey}", highlight=False)
        console.print(f"coldkey  {coldkey}, which has τ{balance_rao / RAO:.9f}", highlight=False)
        console.print(f"subnet   {options.netuid} on {options.network}: τ{cost_rao / RAO:.9f}", highlight=False)
        check_balance(balance_rao, cost_rao, coldkey)
        if not confirm(f"Spend τ{cost_rao / RAO:.9f} for a slot?"):
            return None
        uid = await Coldkey(client, _unlocked(wallet, options)).register(options.netuid, hotkey)
        console.print(f"registered with uid {uid}", highlight=False)
        return outcome(uid, was_registered=False)


def check_balance(balance_rao: int, cost_rao: int, coldkey: str) -> None:
    """Raises ChainError BALANCE_TOO_LOW, which says how much is missing and where to send it."""
    missing_rao = cost_rao + FEE_RESERVE_RAO - balance_rao
    if missing_rao > 0:
        raise ChainError(
            ChainErrorCode.BALANCE_TOO_LOW,
            f"τ{missing_rao / RAO:.9f} are missing on {coldkey} (a slot is τ{cost_rao / RAO:.9f}, "
            f"and τ{FEE_RESERVE_RAO / RAO:.3f} must remain for fees)",
        )


def find_or_make_wallet(options: RegisterOptions, console: Console) -> bittensor.Wallet:
    """The wallet, its keys made where there are none. Says where it is, and shows each new mnemonic once."""
    wallet = bittensor.Wallet(name=options.wallet, hotkey=options.hotkey, path=str(options.wallet_path))
    folder = options.wallet_path / options.wallet
    has_coldkey = (folder / "coldkeypub.txt").exists()
    hotkey_file = folder / "hotkeys" / options.hotkey
    has_hotkey = hotkey_file.exists() or _public_part(hotkey_file).exists()
    console.print(f"wallet   {folder}, hotkey {options.hotkey}", highlight=False)

    def show(kind: str) -> Callable[[str], None]:
        def tell(mnemonic: str) -> None:
            console.print(f"new {kind}; write its words down, they are shown once: {mnemonic}", highlight=False)

        return tell

    try:
        if not has_coldkey:
            password = options.password if options.has_password else None
            wallet.create_new_coldkey(
                use_password=options.has_password, coldkey_password=password, on_mnemonic=show("coldkey")
            )
        if not has_hotkey:
            wallet.create_new_hotkey(use_password=False, on_mnemonic=show("hotkey"))
    except (OSError, EOFError, ValueError, bittensor_core.KeyfileError) as error:
        raise ConfigError(f"cannot make a wallet at {folder}: {error}") from error
    return wallet


def _public_part(hotkey_file: Path) -> Path:
    """Where the SDK keeps the address of a hotkey beside its secret; wallets of old have none."""
    return hotkey_file.with_name(f"{hotkey_file.name}pub.txt")


def _unlocked(wallet: bittensor.Wallet, options: RegisterOptions) -> bittensor.sp_core.Keypair:
    """The coldkey; its password is asked for where it has one and none was given."""
    file = options.wallet_path / options.wallet / "coldkey"
    if not file.exists():
        raise ConfigError(f"no coldkey at {file}; register where it is: the machine that mines needs only the hotkey")
    try:
        return wallet.get_coldkey(options.password)
    except (OSError, EOFError, ValueError, bittensor_core.KeyfileError) as error:
        raise ConfigError(f"cannot unlock {file}: {error}") from error
