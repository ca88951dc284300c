"""Nothing is lost: runs that are killed, starved, stopped and damaged end as if nothing had happened."""

from pathlib import Path

import pytest

from tests.campaign.campaign import ALL_KINDS, Campaign
from tests.campaign.kinds import STOPPED

# On a busy machine a run may be slower than the limits within which stopped processes end it; tests/training/test_hangs.py has those.
PATIENT = tuple(kind for kind in ALL_KINDS if not kind.startswith(STOPPED))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("faults", "kinds"), [(20, PATIENT), pytest.param(100, ALL_KINDS, marks=pytest.mark.exhaustive)], ids=["20", "100"]
)
def test_runs_with_faults_end_bitwise_equal_or_say_what_to_do(
    faults: int, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    campaign = Campaign(faults, seed=faults, kinds=kinds, folder=tmp_path)
    campaign.run()
    assert campaign.deviations == []


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_signals_at_any_time_to_any_process_save_and_the_run_ends_bitwise_equal(tmp_path: Path) -> None:
    campaign = Campaign(50, seed=0, kinds=("signal",), folder=tmp_path)
    campaign.run()
    assert campaign.deviations == []
