import pytest

from cluster.ray import split


@pytest.mark.parametrize(
    ("missing", "free", "shares"),
    [
        (4, {"a": 8}, {"a": 4}),
        (8, {"a": 8, "b": 8}, {"a": 4, "b": 4}),
        (5, {"a": 8, "b": 8}, {"a": 3, "b": 2}),
        (8, {"a": 1, "b": 8, "c": 8}, {"a": 1, "b": 4, "c": 3}),
        (1, {"a": 0, "b": 2}, {"b": 1}),
        (10, {"a": 2, "b": 8}, {"a": 2, "b": 8}),
        (0, {"a": 2}, {}),
    ],
)
def test_workers_are_shared_out_evenly(missing: int, free: dict[str, int], shares: dict[str, int]) -> None:
    assert split(missing, free) == shares
