"""Command `clip-exp export`: writes a model in the format of another library."""

import sys
from pathlib import Path

from clip_exp.config.commands import ExportConfig
from clip_exp.errors import PREEMPTED_EXIT_CODE, Problems
from clip_exp.export.folder import check_target
from clip_exp.export.formats import problems_of
from clip_exp.loading import ModelSource, check_source, find_source
from clip_exp.ranks.failure import Stopped, stop_on_signals


def export(config: ExportConfig) -> int:
    """Export a model and return the exit code.

    Raises:
        ClipExpError: paths or names are invalid, which is checked before the model is loaded; the weights do not fit,
            or the folder cannot be written.
    """
    source = check(config)
    assert config.output is not None
    # Imports torch
    from clip_exp.export.write import export_source

    try:
        with stop_on_signals():
            done = export_source(source, config.output, config.format, config.overwrite)
    except Stopped as stopped:
        print(f"{stopped} Nothing was written.", file=sys.stderr, flush=True)
        return PREEMPTED_EXIT_CODE
    print(f"written: {Path(config.output)} ({config.format}, {done.size / 1e6:,.1f} MB)")
    print(f"checked: normalized features of the exported model differ by at most {done.difference:.1e}")
    return 0


def check(config: ExportConfig) -> ModelSource:
    """Find the model and check that it can be exported, without torch.

    Raises:
        ClipExpError: one line for every problem; the class is that of the gravest one.
    """
    problems, source = Problems(), None
    with problems:
        check_target(config.output, config.overwrite)
    with problems:
        source = check_source(config)
        model = source.model if source else config.model
        problems.add(*(problems_of(config.format, model) if model else []))
    problems.raise_if_any()
    return source or find_source(config)
