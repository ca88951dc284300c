"""Nothing is lost: runs that are killed, starved, stopped and damaged end as if nothing had happened."""

from pathlib import Path

import pytest

from tests.campaign.campaign import ALL_KINDS, Campaign


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("faults", [20, pytest.param(100, marks=pytest.mark.exhaustive)])
def test_runs_with_faults_end_bitwise_equal_or_say_what_to_do(faults: int, tmp_path: Path) -> None:
    campaign = Campaign(faults, seed=faults, kinds=ALL_KINDS, folder=tmp_path)
    campaign.run()
    assert campaign.deviations == []


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_signals_at_any_time_to_any_process_save_and_the_run_ends_bitwise_equal(tmp_path: Path) -> None:
    campaign = Campaign(50, seed=0, kinds=("signal",), folder=tmp_path)
    campaign.run()
    assert campaign.deviations == []
