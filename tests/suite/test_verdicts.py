"""Verdicts follow from where intervals lie."""

from suite.verdicts import above, below

HIGH, LOW, ACROSS = [0.5, 0.1, 0.9], [-0.5, -0.9, -0.1], [0.0, -0.1, 0.1]


def test_above():
    assert above([HIGH, HIGH]) == "holds"
    assert above([HIGH, ACROSS]) == "undecided"
    assert above([HIGH, ACROSS], lenient=True) == "holds"
    assert above([HIGH, ACROSS, LOW]) == above([LOW], lenient=True) == "fails"
    assert above([HIGH], 0.1) == "undecided" and above([HIGH], 0.05) == "holds" and above([HIGH], 0.95) == "fails"


def test_below():
    assert below([LOW, LOW], 0) == "holds"
    assert below([LOW, ACROSS], 0) == "undecided"
    assert below([HIGH, LOW], 0) == "fails"
    assert below([HIGH], 1) == "holds" and below([HIGH], 0.5) == "undecided" and below([HIGH], 0) == "fails"
