"""The time of ``import lth_plugins`` beyond ``import torch``, and the packages it imports."""

import json
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.measure import Times
from benchmarks.report import Row, at_most
from benchmarks.setting import Setting

TIMED = """
import json, sys, time
started = time.perf_counter()
import torch
between = time.perf_counter()
before = set(sys.modules)
import lth_plugins
seconds = between - started, time.perf_counter() - between
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps([*seconds, sorted(new - sys.stdlib_module_names - {"lth_plugins"})]))
"""


def imports(setting: Setting) -> Iterator[Row]:
    """Import in new processes, of which the first warms the disk's cache."""
    found = []
    for _ in range(setting.steps + 1):
        command = [sys.executable, "-c", TIMED]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    torchs, ours = (Times(tuple(run[k] for run in found[1:])) for k in (0, 1))
    (others,) = {tuple(run[2]) for run in found}
    yield Row(
        "import lth_plugins, after torch",
        str(ours),
        f"{torchs} (import torch)",
        ours.median,
        at_most(0.1),
        f"also imports {', '.join(others)}" if others else "imports no other package",
        unit="s",
    )
    yield Row(
        "packages that import lth_plugins brings in beside torch's",
        str(len(others)),
        "–",
        len(others),
        at_most(0),
        unit="packages",
    )
