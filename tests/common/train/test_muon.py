"""Muon against PyTorch's own, and what orthogonalising must do."""

import pytest
import torch

from orion.common.train.muon import Muon, _iterate, _iterate_gram, orthogonalise

SHAPES = [(32, 32), (16, 32), (48, 32), (32, 48), (32, 32)]


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_updates_agree_with_pytorchs_muon_over_several_steps() -> None:
    ours = [gaussian(index, *shape) for index, shape in enumerate(SHAPES)]
    theirs = [param.clone() for param in ours]
    optimizer = Muon([{"params": ours, "lr": 0.02, "weight_decay": 0.1}], momentum=0.95)
    reference = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        before = [param.clone() for param in ours]
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            other.copy_(mine)
            mine.grad = gaussian(100 * step + index, *mine.shape)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
        for mine, other, start in zip(ours, theirs, before, strict=True):
            cosine = torch.cosine_similarity((mine - start).flatten(), (other - start).flatten(), dim=0)
            assert cosine > 0.999  # theirs iterates in bfloat16
            assert float((mine - start).norm()) == pytest.approx(float((other - start).norm()), rel=0.02)


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
def test_orthogonalised_matrices_keep_directions_and_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = gaussian(5, 1, *shape)
    values = torch.linalg.svdvals(orthogonalise(matrix)[0])
    assert values.min() > 0.5
    assert values.max() < 1.3
    u, _, vt = torch.linalg.svd(matrix[0], full_matrices=False)
    assert torch.cosine_similarity(orthogonalise(matrix)[0].flatten(), (u @ vt).flatten(), dim=0) > 0.95


@pytest.mark.parametrize("rank", [16, 3])
@pytest.mark.parametrize("num_columns", [32, 80])
def test_long_matrices_go_through_their_gram_matrix_to_the_same_result(num_columns: int, rank: int) -> None:
    matrices_KMN = gaussian(7, 3, 16, rank) @ gaussian(8, 3, rank, num_columns)
    x_KMN = matrices_KMN / torch.linalg.matrix_norm(matrices_KMN, keepdim=True)

    found_KMN = orthogonalise(matrices_KMN)

    assert torch.equal(found_KMN, _iterate_gram(x_KMN)), "the cheaper way is taken"
    torch.testing.assert_close(found_KMN, _iterate(x_KMN), rtol=0.0, atol=1e-4)


def test_only_matrices_are_taken() -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon([{"params": [torch.zeros(3)], "lr": 0.1, "weight_decay": 0.0}], momentum=0.9)
