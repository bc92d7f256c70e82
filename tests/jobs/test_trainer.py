"""The pieces of a step that need no training: what stops a step before it reaches the weights."""

import math

import pytest

from jobs.trainer import check_finite
from parallel.gradients import GlobalLosses


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_not_finite_is_refused_with_step_and_values(loss: float, norm: float) -> None:
    with pytest.raises(FloatingPointError) as error:
        check_finite(41, GlobalLosses(loss, 0.0, 10), norm)
    for part in ("step 42", f"loss {loss}", f"gradient norm {norm}", "as step 41 left them", "optimizer.lr"):
        assert part in str(error.value)


def test_finite_ones_pass() -> None:
    check_finite(0, GlobalLosses(2.0, 0.0, 10), 1e30)
