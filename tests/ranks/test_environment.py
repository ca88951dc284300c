"""Which rank this process is, as its environment says."""

from collections.abc import Callable, Mapping

import pytest

from clip_exp.devices import parse_devices
from clip_exp.errors import DistributedError
from clip_exp.ranks.environment import Placement, device_problems, is_first_rank, outer_placement

SRUN = {
    "SLURM_STEP_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0",
    "SLURM_JOB_ID": "123456", "SLURM_STEP_NODELIST": "node[3-4],other",
}  # fmt: skip
UNEVEN = {
    **SRUN, "SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
}  # fmt: skip
TORCHRUN = {
    "RANK": "13", "WORLD_SIZE": "16", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "first", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip
Environment = Callable[[Mapping[str, str]], None]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Environment:
    """Replace what launchers set."""
    names = {*SRUN, *UNEVEN, *TORCHRUN, "NODE_RANK", "SLURM_NNODES", "SLURM_NODELIST"}

    def replace(values: Mapping[str, str]) -> None:
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return replace


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "1"}, True),  # left over
        ({**SRUN, "SLURM_PROCID": "0"}, True),
        (SRUN, False),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "1"}, True),  # left over from a batch script
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, True),
    ],
)
def test_the_first_rank_is_known_before_the_group_is_joined(
    variables: dict[str, str], first: bool, environment: Environment
) -> None:
    environment(variables)
    assert is_first_rank() is first


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "1"},
        {"WORLD_SIZE": "8"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # of a batch script: there is no step
        {**SRUN, "SLURM_NTASKS": "1"},  # srun --pty bash
    ],
)
def test_what_is_left_over_in_a_shell_makes_no_rank(variables: dict[str, str], environment: Environment) -> None:
    environment(variables)
    assert outer_placement() is None


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (TORCHRUN, Placement("torchrun", 13, 16, 5, 8, 2, 1, "first", 29500)),
        (SRUN, Placement("srun", 1, 2, 1, 2, 1, 0, "node3", 15000 + 3457)),
        (UNEVEN, Placement("srun", 9, 11, 1, 3, 3, 2, "node3", 15000 + 3457)),
        ({**SRUN, **TORCHRUN}, Placement("torchrun", 13, 16, 5, 8, 2, 1, "first", 29500)),
    ],
)
def test_a_launcher_says_where_a_rank_is(
    variables: dict[str, str], expected: Placement, environment: Environment
) -> None:
    environment(variables)
    assert outer_placement() == expected


def test_a_variable_that_is_not_a_number_is_named(environment: Environment) -> None:
    environment({**TORCHRUN, "LOCAL_RANK": "five"})
    with pytest.raises(DistributedError, match="LOCAL_RANK=five in the environment must be a non-negative integer"):
        outer_placement()


@pytest.mark.parametrize(
    ("devices", "num_nodes", "problem"),
    [
        ("auto", None, None),
        (8, 2, None),
        (16, None, "trainer.devices=16, but torchrun has started 8 processes on this machine"),
        (8, 1, "trainer.num_nodes=1, but torchrun has started 16 processes on 2 machines"),
        ([2, 3], None, "trainer.devices=[2, 3] lists GPUs, but torchrun has started the processes"),
    ],
)
def test_the_configuration_may_not_contradict_the_launcher(
    devices: object, num_nodes: int | None, problem: str | None, environment: Environment
) -> None:
    environment(TORCHRUN)
    found = list(device_problems(parse_devices("auto", devices, "trainer."), num_nodes, "trainer."))
    assert [text[: len(problem or "")] for text in found] == ([] if problem is None else [problem])
