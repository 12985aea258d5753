"""The coverage-guided fuzzer (atheris) on one of the `targets`.

    python -m tests.reliability.fuzz TARGET RUNS SEED

It prints how many files were tried and how many of them accepted, and ends with status 0; at the
first exception that is no `TicketError` it prints that, and ends with another.
"""

import os
import resource
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lth_plugins.ticket", "pickle", "zipfile"]):
    from tests.reliability import targets

SPARE = 2 << 30  # bytes: a ticket of a ResNet-18 and its copies take a tenth


def main(target: str, runs: int, seed: int) -> None:
    read, make_seed = targets.TARGETS[target]
    assert read(make_seed()), f"{target} refuses what it should accept"
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    tried = accepted = 0

    def try_one(content: bytes) -> None:
        nonlocal tried, accepted
        accepted += read(content)
        tried += 1
        if tried == runs:  # here, because libFuzzer leaves the process without a word
            print(f"{target}: {tried:,} tried, {accepted:,} accepted", flush=True)
            os._exit(0)

    with tempfile.TemporaryDirectory() as corpus:
        Path(corpus, "seed").write_bytes(make_seed())
        options = [f"-runs={2 * runs}", f"-seed={seed}", "-max_len=262144", "-rss_limit_mb=4096"]
        options += ["-timeout=60", "-len_control=0", f"-artifact_prefix={corpus}/", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *options, corpus], try_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
