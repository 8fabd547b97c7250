"""SLO classes: what a request is judged by."""

from __future__ import annotations

import pytest

from router.errors import InvalidRequestError, SettingsError
from router.slo import Slo, SloClass, SloLimits, SloPolicy, SloWish, impossible_limits

POLICY = SloPolicy(
    {
        "fast": SloClass(0.5, 0.05, priority=2, downgrade_to="slow"),
        "slow": SloClass(5.0, 0.5, downgrade_to="any"),
        "any": SloClass(60.0, 1.0, priority=-1),
    },
    default="slow",
)
ANY = Slo("any", SloLimits(60.0, 1.0), priority=-1)
SLOW = Slo("slow", SloLimits(5.0, 0.5), downgraded=ANY)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (SloWish(), Slo("slow", SloLimits(5.0, 0.5))),
        (SloWish("fast"), Slo("fast", SloLimits(0.5, 0.05), 2)),
        (SloWish("fast", 1.0), Slo("fast", SloLimits(1.0, 0.05), 2)),
        (SloWish(tpot_s=0.1, priority=7), Slo("slow", SloLimits(5.0, 0.1), 7, own_tpot=True)),
        (SloWish(ttft_s=1.0, tpot_s=0.5), Slo("slow", SloLimits(1.0, 0.5), own_ttft=True)),
        (SloWish("fast", priority=0), Slo("fast", SloLimits(0.5, 0.05), 0)),
        (SloWish("fast", may_downgrade=True), Slo("fast", SloLimits(0.5, 0.05), 2, downgraded=SLOW)),
        (SloWish("any", may_downgrade=True), ANY),
    ],
)
def test_what_is_given_stands_in_for_the_class_s_own(asked, expected):
    assert POLICY.resolve(asked) == expected
    assert POLICY.resolve(asked).may_downgrade is (expected.downgraded is not None)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (SloWish("gold"), "slo.slo_class"),
        (SloWish(ttft_s=0.0), "slo.ttft"),
        (SloWish(ttft_s=float("inf")), "slo.ttft"),
        (SloWish(tpot_s=float("nan")), "slo.tpot"),
        (SloWish(priority=2**31), "slo.priority"),
    ],
)
def test_refused(asked, param):
    with pytest.raises(InvalidRequestError) as caught:
        POLICY.resolve(asked)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("classes", "default", "message"),
    [
        ({"a": SloClass(1.0, 1.0)}, "b", "not one of"),
        ({"a": SloClass(1.0, -1.0)}, "a", r"slo_classes\.a\.tpot_s is -1"),
        ({"a": SloClass(1.0, 1.0, priority=2**31)}, "a", r"slo_classes\.a\.priority is 2147483648"),
        ({"a": SloClass(1.0, 1.0, downgrade_to="b")}, "a", r"slo_classes\.a\.downgrade_to is 'b'"),
        ({"a": SloClass(1.0, 1.0, downgrade_to="a")}, "a", "a -> a"),
        (
            {
                "a": SloClass(1.0, 1.0, downgrade_to="b"),
                "b": SloClass(1.0, 1.0, downgrade_to="c"),
                "c": SloClass(1.0, 1.0, downgrade_to="b"),
            },
            "a",
            "a -> b -> c -> b",
        ),
    ],
)
def test_classes_that_make_no_sense(classes, default, message):
    with pytest.raises(SettingsError, match=message):
        SloPolicy(classes, default)


def test_a_class_that_nobody_can_keep_is_named_with_what_is_possible():
    classes = {"fast": SloClass(0.5, 0.05), "slow": SloClass(5.0, 0.5)}
    said = impossible_limits(classes, SloLimits(0.4, 0.06))
    assert said == {
        "fast.tpot_s": "slo_classes.fast.tpot_s is 0.05, but the fastest workers need 0.06 s with nothing "
        "else to do: no request of this class can be good"
    }
    assert impossible_limits(classes, SloLimits(0.5, 0.05)) == {}
