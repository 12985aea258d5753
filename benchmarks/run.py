#!/usr/bin/env python3
"""Measure lth_plugins beside its peers, and write RESULTS.md.

    make bench                                  everything on the CPU, on two threads
    python benchmarks/run.py --only compaction  these sections alone; the others stay as they are
    python benchmarks/run.py --device cuda      what concerns a GPU, to RESULTS-cuda.md; needs
                                                torch, torchvision, timm and numpy
    python benchmarks/run.py prune file         single benchmarks, printed and not written

Leave the machine alone meanwhile, or give --processor-time. A row is printed as soon as it is
measured; where a package is missing, its benchmarks are skipped by name. What each measures stands
in the module of its name.
"""

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(
    0, str(Path(__file__).parents[1])
)  # a bare GPU machine has a checkout, and nothing installed

from benchmarks.measure import bandwidth, count_processor_time
from benchmarks.report import Row, results, section
from benchmarks.setting import THREADS, TINY, Setting

FOLDER = Path(__file__).parent


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


@dataclass(frozen=True)
class Section:
    """A part of the results that is written as a whole.

    Attributes:
        title: in the file.
        benchmarks: by name.
    """

    title: str
    benchmarks: Mapping[str, Benchmark]


SECTIONS = {
    "pruning": Section(
        "Choosing masks",
        {
            "prune": Benchmark("pruning:one_prune", on_gpu=True),
            "prune-busy": Benchmark("pruning:beside_other_work"),
            "rounds": Benchmark("pruning:all_rounds", on_gpu=True),
            "prune-memory": Benchmark("pruning:memory", on_gpu=True),
        },
    ),
    "second-order": Section(
        "Pruning by second order",
        {
            "cap": Benchmark("second_order:cost"),
            "cap-quality": Benchmark(
                "second_order:quality",
                ("omegaconf", "pytorch_lightning", "safetensors", "sklearn"),
            ),
        },
    ),
    "training": Section(
        "Training with masks",
        {
            "classifier": Benchmark("training:classifier", on_gpu=True),
            "detector": Benchmark("training:detector", ("detectron2",)),
            "segmentor": Benchmark("training:segmentor", ("mmseg",)),
            "memory": Benchmark("training:memory", on_gpu=True),
            "sparse": Benchmark("sparse_training:steps", on_gpu=True),
            "teach-detector": Benchmark("distilling:detector", ("detectron2",)),
            "teach-segmentor": Benchmark("distilling:segmentor", ("mmseg",)),
            "pretrain": Benchmark(
                "pretraining:throughput",
                ("omegaconf", "pytorch_lightning", "safetensors", "sklearn"),
            ),
        },
    ),
    "files": Section(
        "Files and imports",
        {
            "file": Benchmark("files:sizes", ("safetensors", "zstandard")),
            "load": Benchmark("files:loading", ("safetensors", "zstandard")),
            "import": Benchmark("importing:imports"),
        },
    ),
    "compaction": Section(
        "Compacted networks",
        {
            "compact": Benchmark("compact:trunks", ("onnxruntime", "fvcore")),
            "compact-hosts": Benchmark(
                "compact:hosts", ("onnxruntime", "fvcore", "detectron2", "mmseg")
            ),
        },
    ),
    "slimming": Section(
        "Slimmed networks",
        {
            "slim-classifier": Benchmark("slimming:classifier", ("torch_pruning", "onnxruntime")),
            "slim-detectors": Benchmark(
                "slimming:detectors", ("torch_pruning", "onnxruntime", "detectron2")
            ),
            "slim-segmentors": Benchmark(
                "slimming:segmentors", ("torch_pruning", "onnxruntime", "mmseg")
            ),
            "slim-training": Benchmark("slimming:training", ("torch_pruning",)),
        },
    ),
    "studies": Section(
        "Studies",
        {
            "similarity": Benchmark("alike:matrix"),
            "study": Benchmark("studying:study", ("matplotlib", "markupsafe", "rich", "scipy")),
        },
    ),
}
BENCHMARKS = {name: b for part in SECTIONS.values() for name, b in part.benchmarks.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument(
        "--only", nargs="+", default=[], choices=SECTIONS, help="write these sections alone"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", action="store_true", help="small and once, to see that it runs")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="one thread, and its processor time: beside other work, for ratios",
    )
    parser.add_argument("--out", type=Path, help="file to write (default RESULTS.md beside this)")
    args = parser.parse_args(argv)
    unknown = set(args.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown benchmark {min(unknown)}; known are {', '.join(BENCHMARKS)}")
    if args.names and args.only:
        parser.error("single benchmarks are printed, not written: leave out --only, or the names")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch can use, found none")

    if not args.tiny:  # which measures nothing, beside other work
        torch.set_num_threads(THREADS)
    if args.processor_time:
        count_processor_time()
    setting = _setting(torch.device(args.device), args.tiny)
    if args.names:
        _measure({name: BENCHMARKS[name] for name in args.names}, setting)
        return 0
    if args.tiny and args.out is None:
        parser.error("--tiny measures nothing worth keeping: give names, or --out FILE")
    on_gpu = setting.device.type == "cuda"
    path = args.out or FOLDER / ("RESULTS-cuda.md" if on_gpu else "RESULTS.md")
    texts = dict.fromkeys((part.title for part in SECTIONS.values()), "")
    for key in args.only or SECTIONS:
        part = SECTIONS[key]
        started = time.monotonic()
        rows, skipped = _measure(part.benchmarks, setting)
        seconds = time.monotonic() - started
        texts[part.title] = section(
            part.title, rows, skipped, _how(setting, args.processor_time), seconds
        )
        # Written section by section: a measurement of half an hour is not lost with the last one.
        before = path.read_text() if path.is_file() else ""
        path.write_text(results(texts, before))
        print(f"wrote {part.title!r} to {path}", flush=True)
    return 0


def _measure(benchmarks: Mapping[str, Benchmark], setting: Setting) -> tuple[list[Row], list[str]]:
    """The rows, each printed at once, and a sentence for each benchmark that was skipped."""
    rows: list[Row] = []
    skipped: list[str] = []
    for name, benchmark in benchmarks.items():
        reason = _reason_to_skip(benchmark, setting)
        if reason is not None:
            skipped.append(f"{name}: {reason}")
            print(f"skipped {skipped[-1]}", flush=True)
            continue
        for row in benchmark.rows(setting):
            rows.append(row)
            print(row, flush=True)
    return rows, skipped


def _how(setting: Setting, processor_time: bool) -> str:
    on_gpu = setting.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    speed = f"{setting.bandwidth / 1e9:.1f} GB/s"
    threads = "1 thread, its processor time" if processor_time else f"{THREADS} threads"
    return f"{device}, NumPy {np.__version__}, {threads}; a copy moves {speed}"


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
