"""Who started this process, as its environment says."""

import pytest

from clip_exp.ranks.environment import is_first_rank

SRUN = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({**SRUN, "SLURM_PROCID": "0"}, True),
        ({**SRUN, "SLURM_PROCID": "1"}, False),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "1"}, True),  # left over from a batch script
    ],
)
def test_the_first_rank_is_known_before_the_group_is_joined(
    environment: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_rank() is first
