"""Benchmark of how long a checkpoint stalls training: the time of a step that saves, over the median of the other steps.

A run saves every few steps, in turns synchronously (`checkpoint_async=false`) and asynchronously, in one process. The time of a step
is that between the starts of two steps, so it contains the save. The steps after an asynchronous save share the processor with the
thread that hashes and writes, and are listed too. Images are generated. On a shared machine, only the ratio is meaningful.

    python benchmarks/checkpoint_stall.py
    python benchmarks/checkpoint_stall.py --model vit_b16 --batch-size 16 --saves 4
"""

import argparse
import statistics
import tempfile
import time
from typing import Any, ClassVar

import pytorch_lightning as pl

import clip_exp

TARGET_RATIO = 2.0
STEPS_PER_SAVE = 4  # the step that saves, the one after it, and two undisturbed ones
WARM_UP = 2  # steps


class StepStarts(pl.Callback):
    """Callback that records when each step starts, and when the last one has ended."""

    times: ClassVar[list[float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.times.append(time.perf_counter())


def step_times(args: argparse.Namespace, asynchronous: bool) -> list[float]:
    """Return the seconds of each step of a run, without the last."""
    StepStarts.times.clear()
    steps = WARM_UP + STEPS_PER_SAVE * args.saves + 1
    with tempfile.TemporaryDirectory() as folder:
        clip_exp.train(
            f"model={args.model}", "data=shapes", f"data.generate.rows={2 * args.batch_size}", "data.num_workers=1",
            "trainer.limit_val_batches=0", f"global_batch_size={args.batch_size}", f"max_steps={steps}", "precision=32-true",
            f"checkpoint_every_n_steps={STEPS_PER_SAVE}", f"checkpoint_async={str(asynchronous).lower()}",
            "callbacks.progress=none", f"callbacks.extra.starts._target_={__name__}.StepStarts", f"output_dir={folder}",
        )  # fmt: skip
    return [after - before for before, after in zip(StepStarts.times, StepStarts.times[1:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--saves", type=int, default=3, help="saves per run")
    parser.add_argument("--runs", type=int, default=2, help="runs of each kind")
    args = parser.parse_args()
    saving: dict[bool, list[float]] = {False: [], True: []}
    after: dict[bool, list[float]] = {False: [], True: []}
    undisturbed: list[float] = []  # of the synchronous runs: an asynchronous save may slow down several steps
    for run in range(args.runs):
        for asynchronous in (False, True) if run % 2 == 0 else (True, False):
            times = dict(enumerate(step_times(args, asynchronous), start=1))
            steps = [step for step in times if step > WARM_UP]
            saving[asynchronous] += [times[step] for step in steps if step % STEPS_PER_SAVE == 0]
            after[asynchronous] += [times[step] for step in steps if step % STEPS_PER_SAVE == 1]
            if not asynchronous:
                undisturbed += [times[step] for step in steps if step % STEPS_PER_SAVE > 1]
    median = statistics.median(undisturbed)
    print(f"{args.model}, batch {args.batch_size}: median step {median:.2f} s")
    for asynchronous in (False, True):
        stall, next_step = (statistics.median(times[asynchronous]) / median for times in (saving, after))
        name = "asynchronous" if asynchronous else "synchronous"
        print(f"{name}: a saving step takes {stall:.2f}x of it, and the step after it {next_step:.2f}x")
    reached = statistics.median(saving[True]) <= TARGET_RATIO * median
    print(f"target: a saving step takes at most {TARGET_RATIO:g}x asynchronously: {'reached' if reached else 'missed'}")


if __name__ == "__main__":
    main()
