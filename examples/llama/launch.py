# SPDX-License-Identifier: Apache-2.0
"""Several processes of `train.py` on this host, with simulated devices, to try it.

    python launch.py -n 2 --devices 2 -- --mesh fsdp=4 --out out/two ...

On real hosts start `train.py` once on each, with --processes, --process, --coordinator.
"""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

TRAIN = Path(__file__).with_name("train.py")


def commands(count: int, words: list[str]) -> list[list[str]]:
    """The command line of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    joint = ["--processes", str(count), "--coordinator", address]
    program = [sys.executable, str(TRAIN), *words, *joint]
    return [[*program, "--process", str(number)] for number in range(count)]


def environment(devices: int) -> dict[str, str]:
    """That of a process with so many simulated devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=2, help="processes")
    parser.add_argument("--devices", type=int, default=1, help="of each process")
    parser.add_argument("words", nargs="+", help="after --: arguments of train.py")
    given = parser.parse_args()
    shared = environment(given.devices)
    started = [
        subprocess.Popen(words, env=shared) for words in commands(given.n, given.words)
    ]
    codes = [process.wait() for process in started]
    sys.exit(next((abs(code) for code in codes if code), 0))


if __name__ == "__main__":
    main()
