"""A rank's own door: `python -m clip_exp.evaluation.worker <evaluation folder>`, started by `evaluation.launch`."""

import os
from pathlib import Path

from clip_exp.config.load import read_evaluate_config
from clip_exp.errors import PREEMPTED_EXIT_CODE
from clip_exp.evaluation.evaluate import evaluate_in
from clip_exp.evaluation.launch import TIMEOUT_S, check_again, tell_stopped
from clip_exp.ranks.signals import Stopped
from clip_exp.ranks.worker import serve


def work(folder: Path) -> int:
    """Evaluate what the folder's `config.yaml` describes, as one rank."""
    from clip_exp.loading.model import choose_device
    from clip_exp.ranks import group

    main = os.environ["RANK"] == "0"
    config = read_evaluate_config(folder)
    group.start(choose_device(config.accelerator).type, TIMEOUT_S)
    try:
        source, tasks = check_again(config, main)
        evaluate_in(folder, config, source, tasks)
    except Stopped as stopped:
        return tell_stopped(stopped, config) if main else PREEMPTED_EXIT_CODE
    return 0


if __name__ == "__main__":
    serve(work)
