from tests.small_runs import nano, run_dir

__all__ = ["nano", "run_dir"]
