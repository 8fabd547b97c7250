"""SLO classes: what a request is judged by."""

from __future__ import annotations

import pytest

from router.errors import InvalidRequestError, SettingsError
from router.slo import Slo, SloLimits, SloPolicy

POLICY = SloPolicy({"fast": SloLimits(0.5, 0.05), "slow": SloLimits(5.0, 0.5)}, default="slow")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((None, None, None), Slo("slow", SloLimits(5.0, 0.5))),
        (("fast", None, None), Slo("fast", SloLimits(0.5, 0.05))),
        (("fast", 1.0, None), Slo("fast", SloLimits(1.0, 0.05))),
        ((None, None, 0.1), Slo("slow", SloLimits(5.0, 0.1))),
    ],
)
def test_limits_given_stand_in_for_the_class_s_own(asked, expected):
    assert POLICY.resolve(*asked) == expected


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (("gold", None, None), "slo.slo_class"),
        ((None, 0.0, None), "slo.ttft"),
        ((None, float("inf"), None), "slo.ttft"),
        ((None, None, float("nan")), "slo.tpot"),
    ],
)
def test_refused(asked, param):
    with pytest.raises(InvalidRequestError) as caught:
        POLICY.resolve(*asked)
    assert caught.value.param == param


def test_classes_that_make_no_sense():
    with pytest.raises(SettingsError, match="not one of"):
        SloPolicy({"a": SloLimits(1.0, 1.0)}, default="b")
    with pytest.raises(SettingsError, match=r"slo_classes\.a\.tpot_s is -1"):
        SloPolicy({"a": SloLimits(1.0, -1.0)}, default="a")
