"""300 damaged folders. `tools/fuzz_checkpoints.py` tries as many as you like, and prints a table."""

import pytest
from outcome import make_folder, run_case

CASES, GROUPS = 300, 6


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "intact"
    return folder, make_folder(folder)


@pytest.mark.parametrize("group", range(GROUPS))
def test_damage_is_refused_or_harmless(intact, group, tmp_path):
    outcomes = [run_case(number, *intact, tmp_path) for number in range(group, CASES, GROUPS)]
    assert not [(outcome.number, outcome.kind, *outcome.faults) for outcome in outcomes if outcome.faults]
    assert sum(outcome.check == "refused" for outcome in outcomes) > 0.7 * len(outcomes)


def test_the_intact_folder_passes(intact, tmp_path):
    from outcome import check_folder, count_folder

    assert count_folder(intact[0]).layers == check_folder(intact[0]).layers
