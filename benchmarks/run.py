#!/usr/bin/env python3
"""Measure lth_plugins beside its peers, and write RESULTS.md.

    make bench                              everything on the CPU, on two threads
    python benchmarks/run.py --device cuda  what concerns a GPU, to RESULTS-cuda.md; needs torch,
                                            torchvision, timm and numpy
    python benchmarks/run.py prune file     some of it, printed and not written

Leave the machine alone meanwhile. A row is printed as soon as it is measured; where a package is
missing, its benchmarks are skipped by name. What each measures stands in the module of its name.
"""

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(
    0, str(Path(__file__).parents[1])
)  # a bare GPU machine has a checkout, and nothing installed

from benchmarks.measure import bandwidth
from benchmarks.report import Row, results
from benchmarks.setting import TINY, Setting

FOLDER = Path(__file__).parent
THREADS = 2


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is, and what it takes.

    Attributes:
        place: ``module:function``; the function yields rows.
        needs: packages beside torch, torchvision, timm and numpy.
        on_gpu: whether it concerns a GPU.
    """

    place: str
    needs: tuple[str, ...] = ()
    on_gpu: bool = False

    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def rows(self, setting: Setting) -> Iterator[Row]:
        module, name = self.place.split(":")
        function: Callable[[Setting], Iterator[Row]] = getattr(
            importlib.import_module(f"benchmarks.{module}"), name
        )
        return function(setting)


BENCHMARKS = {
    "prune": Benchmark("pruning:one_prune", on_gpu=True),
    "rounds": Benchmark("pruning:all_rounds", on_gpu=True),
    "prune-memory": Benchmark("pruning:memory", on_gpu=True),
    "classifier": Benchmark("training:classifier", on_gpu=True),
    "detector": Benchmark("training:detector", ("detectron2",)),
    "segmentor": Benchmark("training:segmentor", ("mmseg",)),
    "memory": Benchmark("training:memory", on_gpu=True),
    "file": Benchmark("files:sizes", ("safetensors", "zstandard")),
    "load": Benchmark("files:loading", ("safetensors", "zstandard")),
    "similarity": Benchmark("alike:matrix"),
    "import": Benchmark("importing:imports"),
    "pretrain": Benchmark(
        "pretraining:throughput", ("omegaconf", "pytorch_lightning", "safetensors", "sklearn")
    ),
    "study": Benchmark("studying:study", ("matplotlib", "markupsafe", "rich", "scipy")),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="small and once, to see that it runs")
    args = parser.parse_args(argv)
    unknown = set(args.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown benchmark {min(unknown)}; known are {', '.join(BENCHMARKS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch can use, found none")

    started = time.monotonic()
    torch.set_num_threads(THREADS)
    setting = _setting(torch.device(args.device), args.tiny)
    rows: list[Row] = []
    skipped: list[str] = []
    for name in args.names or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        reason = _reason_to_skip(benchmark, setting)
        if reason is not None:
            skipped.append(f"{name}: {reason}")
            print(f"skipped {skipped[-1]}", flush=True)
            continue
        for row in benchmark.rows(setting):
            rows.append(row)
            print(row, flush=True)
    if args.names or args.tiny:
        return 0

    on_gpu = setting.device.type == "cuda"
    if not on_gpu:
        gpu = ", ".join(name for name, benchmark in BENCHMARKS.items() if benchmark.on_gpu)
        skipped.append(
            f"on a GPU ({gpu}): see RESULTS-cuda.md if it is there; if not, nobody has run "
            "`python benchmarks/run.py --device cuda` yet"
        )
    path = FOLDER / ("RESULTS-cuda.md" if on_gpu else "RESULTS.md")
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    speed = f"{setting.bandwidth / 1e9:.1f} GB/s"
    how = f"NumPy {np.__version__}, {THREADS} threads; a copy moves {speed}"
    path.write_text(results(rows, skipped, device, how, time.monotonic() - started))
    print(f"wrote {path}")
    return 0


def _setting(device: torch.device, tiny: bool) -> Setting:
    options = dict(TINY) if tiny else {}
    if device.type == "cuda" and not tiny:
        options = {"batch": 64, "steps": 30}
    return Setting(device, bandwidth(device), **options)


def _reason_to_skip(benchmark: Benchmark, setting: Setting) -> str | None:
    missing = benchmark.missing()
    if missing:
        return f"needs {', '.join(missing)}, not installed here"
    if setting.device.type == "cuda" and not benchmark.on_gpu:
        return "concerns no GPU"
    return None


if __name__ == "__main__":
    sys.exit(main())
