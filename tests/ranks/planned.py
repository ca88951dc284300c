"""A rank that ends as `plan.json` in its folder says."""

import json
import os
import signal
import time
from pathlib import Path

from clip_exp.errors import DataError, DistributedError


def work(folder: Path) -> int:
    plan = json.loads((folder / "plan.json").read_text())[int(os.environ["RANK"])]
    if plan == "bad data":
        raise DataError("picture 7 cannot be read.")
    if plan == "bad name":
        raise DataError("picture \x1b[2J.jpg cannot be read.")
    if plan == "lost touch":
        raise DistributedError("lost touch with another rank that ended.")
    if plan == "bug":
        raise ValueError("a bug")
    if plan == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if plan == "wait":
        time.sleep(60)
    return int(plan)
