"""The command of a campaign: `python -m tests.campaign --faults 1000 --seed 0`. Exits with 1 after any deviation."""

import argparse
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from tests.campaign.campaign import ALL_KINDS, Campaign


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description="Inject faults into training runs.")
    parser.add_argument("--faults", type=int, default=100, help="faults that have to strike")
    parser.add_argument("--seed", type=int, default=0, help="seed of the plan of faults")
    parser.add_argument(
        "--kinds", nargs="+", choices=ALL_KINDS, default=ALL_KINDS, metavar="KIND", help="kinds to draw from"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at once; one per core")
    parser.add_argument("--trial", type=int, help="run only this trial of the plan")
    parser.add_argument("--folder", type=Path, help="new folder for the runs; those with a deviation are kept")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="campaign-"))
    report = partial(print, flush=True)
    campaign = Campaign(options.faults, options.seed, tuple(options.kinds), options.jobs, folder, report)
    well = campaign.run(options.trial)
    print(campaign.table())
    if well:
        shutil.rmtree(folder)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
