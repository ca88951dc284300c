"""Benchmark of the startup time: `train.py --help` and configuration errors, compared with `import hydra` and open_clip's `--help`.

python benchmarks/startup.py
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TRAIN = [sys.executable, str(REPOSITORY / "train.py")]
HYDRA, HELP, TYPO = "import hydra", "train.py --help", "a mistyped key"
COMMANDS = {
    HYDRA: [sys.executable, "-c", "import hydra"],
    HELP: [*TRAIN, "--help"],
    TYPO: [*TRAIN, "optimizer.lrr=1e-3"],
    "contradicting values": [*TRAIN, "max_steps=5", "epochs=5"],
    "open_clip_train --help": [sys.executable, "-m", "open_clip_train.main", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            started_s = time.perf_counter()
            subprocess.run(command, capture_output=True)
            seconds[name].append(time.perf_counter() - started_s)
    for name, values in seconds.items():
        print(f"{name:<24}  median {statistics.median(values):.2f} s  (from {min(values):.2f} to {max(values):.2f})")
    hydra, help_s, typo = (statistics.median(seconds[name]) for name in (HYDRA, HELP, TYPO))
    print(f"{HELP}: {help_s / hydra:.1f} times {HYDRA} (target: at most 3 times, and under 1 s)")
    print(f"{TYPO}: {typo / hydra:.1f} times {HYDRA} (target: under 0.6 s)")


if __name__ == "__main__":
    main()
