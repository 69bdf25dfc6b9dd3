"""The forgetting matrix: definitions, signs, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthokit.diagnostics.forgetting import forgetting_matrix
from orthokit.errors import NonFiniteError, OptionError, ShapeError

NAN = float("nan")


def scores(tasks, *runs, seed=0):
    return torch.rand(*runs, tasks, tasks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(A):
    """Loops over tasks, as the formulas read."""
    T = len(A)
    forgetting = [max(A[t][k] for t in range(T - 1) if A[t][k] == A[t][k]) - A[-1][k] for k in range(T - 1)]
    backward = sum(A[-1][k] - A[k][k] for k in range(T - 1)) / (T - 1)
    return forgetting, backward


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_forgetting_and_transfer_are_the_formulas(tasks, seed):
    A = scores(tasks, seed=seed)
    found = forgetting_matrix(A)
    forgetting, backward = reference(A.tolist())
    torch.testing.assert_close(found.forgetting, torch.tensor(forgetting, dtype=torch.float64))
    assert found.backward_transfer.item() == pytest.approx(backward)
    assert found.average.item() == pytest.approx(float(A[-1].mean()))
    assert found.learned.item() == pytest.approx(float(A.diagonal().mean()))
    # The best of all earlier rows is at least the row in which the task was learned.
    assert found.mean_forgetting.item() >= -found.backward_transfer.item() - 1e-12


def test_what_was_not_measured_is_left_out():
    A = scores(4)
    holes = A.masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), NAN)
    found = forgetting_matrix(holes)
    torch.testing.assert_close(found.forgetting, torch.tensor(reference(holes.tolist())[0], dtype=torch.float64))
    assert found.backward_transfer == forgetting_matrix(A).backward_transfer
    with pytest.raises(OptionError, match="forward transfer"):
        _ = found.forward_transfer


def test_losses_are_the_same_story_upside_down():
    A, b = scores(3), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    up, down = forgetting_matrix(A, before=b), forgetting_matrix(-A, lower_is_better=True, before=-b)
    for name in ("forgetting", "mean_forgetting", "backward_transfer", "forward_transfer"):
        torch.testing.assert_close(getattr(up, name), getattr(down, name))
    assert down.average == -up.average


def test_forward_transfer_is_the_gain_before_a_task_is_learned():
    A = torch.tensor([[0.9, 0.6, 0.5], [0.8, 0.9, 0.7], [0.8, 0.9, 0.9]])
    found = forgetting_matrix(A, before=torch.tensor([0.5, 0.5, 0.5]))
    assert found.forward_transfer.item() == pytest.approx(((0.6 - 0.5) + (0.7 - 0.5)) / 2)


def test_runs_are_kept_apart():
    A = scores(3, 2, 5)
    found = forgetting_matrix(A)
    assert found.forgetting.shape == (2, 5, 2) and found.backward_transfer.shape == (2, 5)
    torch.testing.assert_close(found.forgetting[1, 3], forgetting_matrix(A[1, 3]).forgetting)


def test_a_model_that_forgets_nothing_has_zeros():
    A = torch.full((3, 3), 0.75)
    found = forgetting_matrix(A)
    assert found.forgetting.tolist() == [0, 0] and found.backward_transfer == 0


def test_bad_matrices_are_named(unchecked):
    with pytest.raises(ShapeError, match="square"):
        forgetting_matrix(torch.ones(2, 3))
    with pytest.raises(ShapeError, match="T >= 2"):
        forgetting_matrix(torch.ones(1, 1))
    with pytest.raises(NonFiniteError, match="already learned"):
        forgetting_matrix(torch.tensor([[1.0, 1.0], [NAN, 1.0]]))
    with pytest.raises(NonFiniteError, match="already learned"):
        forgetting_matrix(torch.tensor([[1.0, float("inf")], [1.0, 1.0]]))
    with pytest.raises(ShapeError, match="before"):
        forgetting_matrix(torch.ones(2, 2), before=torch.ones(3))
