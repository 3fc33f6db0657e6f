"""What happens to the residual stream between two stages: a sender part and a receiver part for each kind of boundary.

Owns the learned bottlenecks and the fixed subspace. Must not know how stages are wired or transported. Every sender
takes the two summands of its last block's output and the token ids and returns the narrow tensor; every receiver
takes the narrow tensor and the ids and returns what its first block's attention reads and what that attention is
added to. Both act on each token alone, so causality and caching are untouched. Invariant: only the narrow tensor and
the ids cross.

Shapes: B sequences, T tokens, D model width, C boundary width, V vocabulary, R anchor rank.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from orion.common.model.config import ModelConfig
from orion.common.model.layers import EMBEDDING_STD, DerivedTables, Embedding, Linear, named_generator

# Learned maps beside an identity path start this small against unit-variance inputs, so that training starts from the
# identity.
_NEAR_ZERO = 0.01
_IOTA_STD = 0.02  # the public module's


class Mlp(nn.Module):
    """Two matrices with SiLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, out_std: float) -> None:
        super().__init__()
        self.up = Linear(inputs, hidden, 1 / math.sqrt(inputs))
        self.down = Linear(hidden, outputs, out_std)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        out: Tensor = self.down(functional.silu(self.up(x)))
        return out


def _residual_map(config: ModelConfig, inputs: int, outputs: int) -> nn.Module:
    """A learned map beside an identity path, of the configured shape, starting near zero."""
    if config.boundary.maps == "linear":
        return Linear(inputs, outputs, _NEAR_ZERO / math.sqrt(inputs))
    hidden = config.boundary_mlp_width
    return Mlp(inputs, hidden, outputs, _NEAR_ZERO / math.sqrt(hidden))


def _unit_rms(x: Tensor, eps: float) -> Tensor:
    """x over its root mean square; without learned scales, which the matrix behind it would only repeat."""
    return functional.rms_norm(x, x.shape[-1:], eps=eps)


class _SendNormalised(torch.autograd.Function):
    """z = x[:C] + encoder · x / rms(x), with one pass over the model's width forward beside the matrix, and two back.

    A matrix gives the same whether its input is divided by a number a token or its output. Dividing the output, which
    is narrow, leaves little to do over the model's width. Autograd over the formula makes a dozen passes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, encoder_CD: Tensor, eps: float) -> Tensor:
        """x [..., D] -> z [..., C]; the root mean square is float32 where x is narrower."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        inverse: Tensor = (norm.square() / x.shape[-1] + eps).rsqrt()
        encoded = functional.linear(x, encoder_CD)
        ctx.save_for_backward(x, encoder_CD, inverse, encoded)
        return x[..., : encoder_CD.shape[0]] + (encoded * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of x and the matrix."""
        (gradient,), (x, encoder_CD, inverse, encoded) = gradients, ctx.saved_tensors
        of_encoded = (gradient * inverse).to(x.dtype)
        of_inverse = (gradient * encoded).sum(-1, keepdim=True, dtype=inverse.dtype)
        of_x = of_encoded @ encoder_CD
        of_x.addcmul_(x, (-of_inverse * inverse**3 / x.shape[-1]).to(x.dtype))
        of_x[..., : encoder_CD.shape[0]] += gradient
        return of_x, of_encoded.flatten(0, -2).T @ x.flatten(0, -2), None


class Sender(nn.Module):
    """The sending half of a boundary; this one, for `none`, sends the whole residual stream."""

    def forward(self, after_BTD: Tensor, ffn_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """z [B, T, C] of the block output after_BTD + ffn_BTD."""
        return after_BTD + ffn_BTD


class Receiver(nn.Module):
    """The receiving half of a boundary; this one, for `none`, hands on what came."""

    def forward(self, z_BTC: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(input of the first block's attention, residual its output is added to), [B, T, D] each."""
        return z_BTC, z_BTC


class LinearSender(Sender):
    """One learned matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = Linear(config.width, config.boundary_width, 1 / math.sqrt(config.width))

    def forward(self, after_BTD: Tensor, ffn_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """See Sender."""
        z_BTC: Tensor = self.encoder(after_BTD + ffn_BTD)
        return z_BTC


class LinearReceiver(Receiver):
    """One learned matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.decoder = Linear(config.boundary_width, config.width, 1 / math.sqrt(config.boundary_width))

    def forward(self, z_BTC: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """See Receiver."""
        x_BTD = self.decoder(z_BTC)
        return x_BTD, x_BTD


class ResidualSender(Sender):
    """z = x[:C] + encoder(x / rms(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._boundary_width = config.boundary_width
        self._eps = config.norm_eps
        self.encoder = _residual_map(config, config.width, config.boundary_width)

    def forward(self, after_BTD: Tensor, ffn_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """See Sender."""
        x_BTD = after_BTD + ffn_BTD
        if isinstance(self.encoder, Linear):
            z_BTC: Tensor = _SendNormalised.apply(x_BTD, self.encoder.weight, self._eps)  # type: ignore[no-untyped-call]
            return z_BTC
        encoded_BTC: Tensor = self.encoder(_unit_rms(x_BTD, self._eps))
        return x_BTD[..., : self._boundary_width] + encoded_BTC


class ResidualReceiver(Receiver):
    """x = pad(z) + decoder(z / rms(z)), plus the token's anchor if the boundary has one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._width, self._boundary_width = config.width, config.boundary_width
        self._eps = config.norm_eps
        self.decoder = _residual_map(config, config.boundary_width, config.width)
        self.anchor = Anchor(config) if config.boundary.kind == "anchored" else None

    def forward(self, z_BTC: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """See Receiver."""
        unit_BTC = _unit_rms(z_BTC, self._eps)
        if isinstance(self.decoder, Linear):
            # Identity and map as one matrix: padding z and adding it would be two passes more over the model's width.
            identity_DC = torch.eye(self._width, self._boundary_width, dtype=z_BTC.dtype, device=z_BTC.device)
            both_DC = torch.cat([identity_DC, self.decoder.weight], dim=1)
            x_BTD = functional.linear(torch.cat([z_BTC, unit_BTC], dim=-1), both_DC)
        else:
            x_BTD = functional.pad(z_BTC, (0, self._width - self._boundary_width)) + self.decoder(unit_BTC)
        if self.anchor is not None:
            x_BTD = x_BTD + self.anchor(ids_BT)
        return x_BTD, x_BTD


class Anchor(nn.Module):
    """The receiver's own learned embedding of each token: a table [V, D], or [V, R] times [R, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rank = config.boundary.anchor_rank
        if rank is None:
            self.table = Embedding(config.vocab_size, config.width, EMBEDDING_STD)
            self.up = None
        else:
            self.table = Embedding(config.vocab_size, rank, 1.0)
            self.up = Linear(rank, config.width, EMBEDDING_STD / math.sqrt(rank))

    def forward(self, ids_BT: Tensor) -> Tensor:
        """ids [B, T] -> [B, T, D]."""
        row: Tensor = self.table(ids_BT)
        return row if self.up is None else self.up(row)


class IotaSender(Sender):
    """z = encoder(silu(ffn)) + after[:C]: the squeeze sits inside the sender's last block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._boundary_width = config.boundary_width
        self.encoder = Linear(config.width, config.boundary_width, _IOTA_STD)

    def forward(self, after_BTD: Tensor, ffn_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """See Sender."""
        z_BTC: Tensor = self.encoder(functional.silu(ffn_BTD)) + after_BTD[..., : self._boundary_width]
        return z_BTC


class IotaReceiver(Receiver):
    """Attention reads relu(decoder(z)); its output is added to pad(z), so the widened tensor itself is no residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._pad = config.width - config.boundary_width
        self.decoder = Linear(config.boundary_width, config.width, _IOTA_STD)

    def forward(self, z_BTC: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """See Receiver."""
        return functional.relu(self.decoder(z_BTC)), functional.pad(z_BTC, (0, self._pad))


class SubspaceTables(DerivedTables):
    """The fixed orthonormal basis [D, C] and token table [V, D] of the `subspace` boundary; equal in every stage.

    Their last digits may differ between machines, as those of any computation may; nothing is agreed on byte by byte
    here.
    """

    basis_DC: Tensor
    tokens_VD: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self._config = config
        self._fill(torch.empty(0).device)

    def compute(self) -> dict[str, Tensor]:
        """See DerivedTables."""
        config = self._config
        basis_shape = (config.width, config.boundary_width)
        tokens_shape = (config.vocab_size, config.width)
        if torch.empty(0).is_meta:
            return {"basis_DC": torch.empty(basis_shape), "tokens_VD": torch.empty(tokens_shape)}
        seed = config.boundary.subspace_seed
        gaussian = torch.randn(basis_shape, dtype=torch.float64, generator=named_generator(seed, "subspace.basis"))
        tokens_VD = torch.randn(tokens_shape, generator=named_generator(seed, "subspace.tokens"))
        return {"basis_DC": torch.linalg.qr(gaussian).Q.float(), "tokens_VD": tokens_VD}

    def tokens(self, ids_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """The fixed rows [B, T, D] of the ids."""
        return functional.embedding(ids_BT, self.tokens_VD).to(dtype)

    def project_columns(self, matrix_DI: Tensor) -> None:
        """Moves every column of a matrix that writes to the residual stream into the subspace, in place: W ← U Uᵀ W."""
        basis_DC = self.basis_DC.to(matrix_DI.device, torch.float64)
        matrix_DI.copy_(basis_DC @ (basis_DC.T @ matrix_DI.double()))

    def project_rows(self, table_VD: Tensor) -> None:
        """Moves every row of an embedding into the subspace, in place: E ← E U Uᵀ."""
        basis_DC = self.basis_DC.to(table_VD.device, torch.float64)
        table_VD.copy_((table_VD.double() @ basis_DC) @ basis_DC.T)


class SubspaceSender(Sender):
    """z = Uᵀ (x - tokens): the coordinates in the subspace, which hold all of x while the projections are kept."""

    def __init__(self, tables: SubspaceTables) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, after_BTD: Tensor, ffn_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """See Sender."""
        x_BTD = after_BTD + ffn_BTD
        return (x_BTD - self.tables.tokens(ids_BT, x_BTD.dtype)) @ self.tables.basis_DC.to(x_BTD.dtype)


class SubspaceReceiver(Receiver):
    """x = U z + tokens."""

    def __init__(self, tables: SubspaceTables) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, z_BTC: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """See Receiver."""
        x_BTD = z_BTC @ self.tables.basis_DC.to(z_BTC.dtype).T + self.tables.tokens(ids_BT, z_BTC.dtype)
        return x_BTD, x_BTD


class Boundary(nn.Module):
    """Both ends of one boundary, or the one that a stage holds."""

    def __init__(
        self, config: ModelConfig, tables: SubspaceTables | None, has_sender: bool, has_receiver: bool
    ) -> None:
        """`tables` is given exactly for the kind `subspace`."""
        super().__init__()
        self.sender = _make_sender(config, tables) if has_sender else None
        self.receiver = _make_receiver(config, tables) if has_receiver else None

    def send(self, after_BTD: Tensor, ffn_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        """See Sender; the module must hold that end."""
        assert self.sender is not None
        z_BTC: Tensor = self.sender(after_BTD, ffn_BTD, ids_BT)
        return z_BTC

    def receive(self, z_BTC: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """See Receiver; the module must hold that end."""
        assert self.receiver is not None
        input_BTD, residual_BTD = self.receiver(z_BTC, ids_BT)
        return input_BTD, residual_BTD


def _make_sender(config: ModelConfig, tables: SubspaceTables | None) -> Sender:
    match config.boundary.kind:
        case "anchored" | "resbm":
            return ResidualSender(config)
        case "linear":
            return LinearSender(config)
        case "iota":
            return IotaSender(config)
        case "subspace":
            assert tables is not None
            return SubspaceSender(tables)
        case "none":
            return Sender()


def _make_receiver(config: ModelConfig, tables: SubspaceTables | None) -> Receiver:
    match config.boundary.kind:
        case "anchored" | "resbm":
            return ResidualReceiver(config)
        case "linear":
            return LinearReceiver(config)
        case "iota":
            return IotaReceiver(config)
        case "subspace":
            assert tables is not None
            return SubspaceReceiver(tables)
        case "none":
            return Receiver()
