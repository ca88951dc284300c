"""Work whose ranks end as `plan.json` in its folder says."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_exp.devices import Devices, parse_devices
from clip_exp.errors import ClipExpError, DataError, DistributedError
from clip_exp.ranks import failure
from clip_exp.ranks.launch import Opened, Work, launch_work


def work(folder: Path) -> int:
    plan = json.loads((folder / "plan.json").read_text())[int(os.environ.get("RANK", "0"))]
    if plan == "bad data":
        raise DataError("image 7 cannot be read.")
    if plan == "bad name":
        raise DataError("image \x1b[2J.jpg cannot be read.")
    if plan == "lost connection":
        raise DistributedError("lost the connection to another rank, which ended.")
    if plan == "bug":
        raise ValueError("a bug")
    if plan == "later bad data":
        time.sleep(0.5)
        raise DataError("image 7 cannot be read.")
    if plan == "blocked bug":  # in what tidies up: the failure is reported before
        try:
            raise ValueError("a bug")
        except ValueError as error:
            failure.report(error)
            time.sleep(60)
    if plan == "signaled":  # alone, before it has a way of its own to stop
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    if plan == "exits":
        sys.exit(5)
    if plan == "aborted":
        os.abort()
    if plan == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if plan == "wait":
        time.sleep(60)
    return int(plan)


class Planned(Work):
    """As many ranks as the plan has entries."""

    def __init__(self, folder: Path, *plan: str, finished: bool = False) -> None:
        self.folder = folder
        self.plan = plan
        self.finished = finished
        self.rank = work
        self.timeout_s = 60
        self.held = False
        self.records: list[dict[str, Any]] = []

    @contextmanager
    def open(self) -> Iterator[Opened]:
        (self.folder / "plan.json").write_text(json.dumps(self.plan))
        self.held = True
        try:
            yield Opened(self.folder, self.finished)
        finally:
            self.held = False

    def devices(self) -> Devices:
        return parse_devices("cpu", len(self.plan))

    def device_type(self) -> str:
        return "cpu"

    def run(self, folder: Path) -> int:
        assert self.held == (os.environ.get("RANK", "0") == "0")
        return work(folder)

    def note(self, folder: Path, status: str, **facts: Any) -> None:
        assert self.held or "RANK" in os.environ
        self.records.append({"status": status, **facts})


def main() -> None:
    """As a rank of torchrun: print the folder and the code, or the error."""
    parent, *plan = sys.argv[1:]
    own = Path(parent) / os.environ["RANK"]
    own.mkdir()
    try:
        print(*launch_work(Planned(own, *plan, finished="finished" in plan)))
    except ClipExpError as error:
        print(error)


if __name__ == "__main__":
    main()
