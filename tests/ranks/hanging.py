"""A process with a heartbeat and a watchdog, which hangs in one of several ways."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from clip_exp.ranks import heartbeat
from clip_exp.ranks.heartbeat import Heartbeat, Phase
from clip_exp.ranks.watchdog import guarded

HANG_S = 1.0


def note(folder: Path, status: str, **facts: Any) -> None:
    (folder / "noted").write_text(f"{status} {facts['exit_code']} {facts['error']}")


def main() -> None:
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    own = Heartbeat(folder, 0, HANG_S, None)
    own.limits[Phase.forward] = HANG_S
    with heartbeat.beating(own), guarded(own, folder, None, note):
        for _ in range(5):  # until the watchdog is there
            heartbeat.enter(Phase.forward, 7)
            time.sleep(0.3)
        print("ready", flush=True)
        if kind == "sleeps":
            time.sleep(60)
        if kind == "holds":
            ctypes.PyDLL(None).sleep(60)
        if kind == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "debugged":
            exec("import time; time.sleep(4)", {"__name__": "pdb"})
        if kind == "suspended":
            for _ in range(20):
                heartbeat.beat()
                time.sleep(0.1)
        if kind == "slow":
            for _ in range(6):
                time.sleep(0.7)
                heartbeat.beat()


if __name__ == "__main__":
    from tests.ranks import hanging  # the watchdog imports `note` by the name of its module

    hanging.main()
