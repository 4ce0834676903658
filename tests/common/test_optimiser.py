"""The learning rate that both trainings follow."""

import pytest

from common.optimiser import learning_rate_factor


@pytest.mark.parametrize(
    ("schedule", "warm_up_steps", "num_steps", "factors"),  # factors: step -> share of the full learning rate
    [
        ("constant", 0, 10, {1: 1.0}),
        ("constant", 4, 10, {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0, 5: 1.0, 9: 1.0}),
        ("cosine", 0, 10, {1: 1.0, 6: 0.5}),
        ("cosine", 0, 100, {1: 1.0, 51: 0.5, 101: 0.0, 151: 0.0}),
        ("cosine", 12, 10, {6: 0.25}),
        ("cosine", 2, 4, {1: 0.5, 2: 0.8535533905932737, 3: 0.5, 4: 0.1464466094067262, 5: 0.0}),
        ("cosine", 0, float("inf"), {1: 1.0, 10**6: 1.0}),
    ],
)
def test_learning_rate_factor(schedule, warm_up_steps, num_steps, factors):
    found = {step: learning_rate_factor(schedule, step, warm_up_steps, num_steps) for step in factors}
    assert found == pytest.approx(factors, abs=1e-12)
