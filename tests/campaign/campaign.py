"""Many trials at once, and the table of what came of their faults."""

import io
import itertools
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.campaign.configurations import NON_FINITE_NEEDS, Configuration, has_key
from tests.campaign.kinds import KINDS, NON_FINITE_STEP
from tests.campaign.references import Reference, make_reference
from tests.campaign.trials import Result, draw_trial, run_trial

ALL_KINDS = (*KINDS, NON_FINITE_STEP)


@dataclass
class Campaign:
    """Trials until enough faults have struck. The trials depend on the seed alone; how many fit depends on the times.

    Args:
        faults: number of faults that have to strike.
        seed: of the plan.
        kinds: names of the kinds to draw from.
        jobs: trials at once.
        folder: for the runs; those with a deviation are kept.
        report: called with a line about each fault, and a text about each deviation.
    """

    faults: int
    seed: int
    kinds: tuple[str, ...] = ALL_KINDS
    jobs: int = 2
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="campaign-")))
    report: Callable[[str], None] = print
    results: list[Result] = field(default_factory=list, init=False)
    deviations: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()  # as the kernel names the working folders of processes
        self._references: dict[Configuration, Reference] = {}
        self._locks: dict[Configuration, threading.Lock] = {}
        self._lock = threading.Lock()

    def run(self, only: int | None = None) -> bool:
        """Run the campaign, or one of its trials; return True if there was no deviation."""
        self._numbers = itertools.count() if only is None else iter([only])
        self._start_s = time.monotonic()
        with ThreadPoolExecutor(self.jobs) as pool:
            for job in [pool.submit(self._work) for _ in range(self.jobs)]:
                job.result()
        return not self.deviations

    @property
    def struck(self) -> int:
        return sum(result.struck for result in self.results)

    def _work(self) -> None:
        while True:
            with self._lock:
                number = next(self._numbers, None)
                if number is None or self.struck >= self.faults:
                    return
            trial = draw_trial(self.seed, number, self.kinds)
            reference = self._reference(trial.configuration)
            results, deviation = run_trial(trial, self.seed, reference, self.folder / f"trial-{number:04d}")
            with self._lock:
                for result in results:
                    self.results.append(result)
                    self.report(self._line(result))
                if deviation:
                    self.deviations.append(deviation)
                    self.report(f"DEVIATION in {deviation}")

    def _reference(self, configuration: Configuration) -> Reference:
        """Return the undisturbed run of a configuration, which is made once."""
        with self._lock:
            lock = self._locks.setdefault(configuration, threading.Lock())
        with lock:
            if configuration not in self._references:
                place = self.folder / "undisturbed" / "".join(filter(str.isalnum, configuration.name))
                self._references[configuration] = make_reference(place, configuration)
            return self._references[configuration]

    def _line(self, result: Result) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._start_s), 60)
        count = f"{self.struck:>4}/{self.faults} {minutes:>3}:{seconds:02d}"
        return (
            f"{count}  trial {result.trial} ({result.configuration})  {result.kind}: {result.fault}: {result.outcome}"
        )

    def table(self) -> str:
        """Return the table of kinds, with their numbers, outcomes and times, and the deviations."""
        minutes = (time.monotonic() - self._start_s) / 60
        table = Table(title=f"{self.struck} faults with seed {self.seed} in {minutes:.1f} minutes")
        for column in ("fault", "struck", "did not", "outcomes", "s each"):
            table.add_column(column, justify="left" if column in ("fault", "outcomes") else "right")
        for kind in self.kinds:
            mine = [result for result in self.results if result.kind == kind]
            struck = [result for result in mine if result.struck]
            outcomes = Counter(result.outcome for result in struck).most_common()
            mean_s = sum(result.seconds for result in struck) / max(1, len(struck))
            text = ", ".join(f"{outcome}: {count}" for outcome, count in outcomes) or _why_none(kind)
            table.add_row(kind, str(len(struck)), str(len(mine) - len(struck)), text, f"{mean_s:.1f}")
        configurations = Counter(result.configuration for result in self.results if result.struck)
        console = Console(file=io.StringIO(), width=140)
        console.print(table)
        for name, count in sorted(configurations.items()):
            console.print(f"{count:>5} faults in {name}")
        console.print(f"deviations: {len(self.deviations)}")
        for deviation in self.deviations:
            console.print(deviation, markup=False, highlight=False, soft_wrap=True)
        return console.file.getvalue()  # type: ignore[attr-defined]


def _why_none(kind: str) -> str:
    needs = NON_FINITE_NEEDS if kind == NON_FINITE_STEP else KINDS[kind].needs
    return f"there is no {needs}" if needs and not has_key(needs) else ""
