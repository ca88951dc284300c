"""Each rank has a GPU of its own, and the environment is as it was when the group has ended."""

import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from clip_exp.ranks import group
from clip_exp.ranks.environment import Placement, local_placement


def placed(local_rank: int, local_world_size: int = 8) -> Placement:
    return local_placement(local_rank, local_world_size, 29500)


def chosen(local_rank: int, visible: int, uuids: str = "abcdefgh") -> tuple[group._GPU, list[int]]:
    """The GPU of a rank that sees some, and those that were made current."""
    current: list[int] = []
    with (
        mock.patch("torch.cuda.device_count", return_value=visible),
        mock.patch("torch.cuda.set_device", side_effect=current.append),
        mock.patch("torch.cuda.get_device_properties", side_effect=lambda index: SimpleNamespace(uuid=uuids[index])),
    ):
        return group._choose_gpu(placed(local_rank)), current


def test_a_rank_takes_the_gpu_of_its_local_rank() -> None:
    gpu, current = chosen(5, visible=8)
    assert (gpu.uuid, current) == ("f", [5])
    assert group._gpu_problem([chosen(rank, visible=8)[0] for rank in range(8)]) is None


def test_a_rank_that_sees_one_gpu_takes_it() -> None:
    """As under srun --gpus-per-task=1, where each task sees its own as number 0."""
    gpu, current = chosen(5, visible=1, uuids="x")
    assert (gpu.uuid, current) == ("x", [0])
    assert group._gpu_problem([chosen(rank, visible=1, uuids="stuvwxyz"[rank])[0] for rank in range(8)]) is None


def test_two_ranks_with_one_gpu_are_refused() -> None:
    problem = group._gpu_problem([chosen(rank, visible=1, uuids="x")[0] for rank in range(8)])
    assert problem is not None
    assert "ranks 0 and 1 have the same GPU" in problem
    assert "where 8 ranks were started and a rank sees 1 GPUs" in problem


def test_more_ranks_than_gpus_are_refused_with_the_numbers() -> None:
    problem = group._gpu_problem([chosen(rank, visible=4)[0] for rank in range(8)])
    assert problem is not None
    assert problem.startswith("8 ranks were started on ")
    assert problem.endswith("which has 4 GPUs: start one rank per GPU.")


def test_equal_gpus_of_two_machines_are_two() -> None:
    gpu = chosen(0, visible=1)[0]
    assert group._gpu_problem([gpu, gpu._replace(rank=1, host="other")]) is None


def test_the_environment_is_replaced_inside_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")  # left over, as WORLD_SIZE is not there
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = dict(os.environ)
    with group.membership("cpu", 60):
        assert (group.rank(), group.world_size(), group.local_world_size()) == (0, 1, 1)
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
        assert "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ
        with group.membership("cpu", 60):
            pass
        assert dist.is_initialized()
    assert not dist.is_initialized()
    assert dict(os.environ) == before


def test_a_failure_of_one_process_alone_ends_its_group() -> None:
    before = dict(os.environ)
    with pytest.raises(ValueError, match="a bug"), group.membership("cpu", 60):
        raise ValueError("a bug")
    assert not dist.is_initialized()
    assert dict(os.environ) == before


def test_a_failure_among_several_ranks_leaves_the_group_alone() -> None:
    """Destroying it would wait for ranks that are stuck in a collective."""
    with (
        mock.patch.object(group, "start"),
        mock.patch.object(group, "stop") as stop,
        mock.patch.object(group, "world_size", return_value=2),
    ):
        with pytest.raises(ValueError, match="a bug"), group.membership("cpu", 60):
            raise ValueError("a bug")
        stop.assert_not_called()
        with group.membership("cpu", 60):
            pass
        stop.assert_called_once()


def test_out_of_memory_inside_a_collective_is_not_blamed_on_another_rank() -> None:
    with (
        mock.patch.object(group, "world_size", return_value=2),
        mock.patch.object(dist, "all_gather_object", side_effect=torch.OutOfMemoryError("CUDA out of memory.")),
        pytest.raises(torch.OutOfMemoryError),
    ):
        group.gather_objects(1)
