"""Every family in and out: the same bits, and the logits and rope that its makers compute."""

import pytest

from tests.functional_tests.families import CASES, line, measure

pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.fault])
def test_a_family_comes_in_and_goes_out(name, tmp_path):
    rows = measure(CASES[name], tmp_path)
    print(*(line(name, row) for row in rows), sep="\n")
    assert [row["direction"] for row in rows][:2] == ["in", "out"]
    for row in rows:
        assert row["same"] or (row["same"] is None and "as LLaMA" in row["direction"])
        assert row["rope"] <= 1e-6
        assert row["plain"] < 1e-4 and row["exact"] < 1e-4
        assert row["skipped"] < 5e-3  # their float32 angles


def test_a_wrong_order_is_seen_by_the_logits_and_by_them_only(tmp_path):
    (case,) = (case for case in CASES.values() if case.fault)
    for row in measure(case, tmp_path):
        assert row["same"] and row["rope"] <= 1e-6  # as the mistake is undone on the way back
        assert row["plain"] > 0.1 and row["exact"] > 0.1
