"""Running what is planned, through submitit: local processes, or jobs of Slurm.

Each run is a job that takes the run's lock, and its tool keeps it. So nothing runs twice at a time,
whatever was killed: a sweep that is started again waits for what an earlier one left running.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import submitit
import torch
from rich.console import Console
from submitit.core.utils import FailedJobError

from lth_plugins import progress
from lth_plugins.errors import ConfigError, LthError, RunError
from lth_plugins.progress import duration
from lth_plugins.resilience.exit_codes import EXIT_CODE
from lth_plugins.resilience.lock import is_locked, lock_notes, locked
from lth_plugins.resilience.sigterm import ctrl_c_waits, stoppable
from lth_plugins.study.plan.config import StudyConfig
from lth_plugins.study.plan.expand import Plan, check_inputs
from lth_plugins.study.plan.kinds import FIND
from lth_plugins.study.plan.paths import prepared_by
from lth_plugins.study.plan.runs import Run, write_plan
from lth_plugins.study.plan.tools import TOOLS
from lth_plugins.study.run import steps
from lth_plugins.study.run.slurm import JobStates
from lth_plugins.study.run.state import lock_path, read_result
from lth_plugins.study.run.status import doing, say, summary
from lth_plugins.study.run.steps import Step, StepError, log_path

TRIES = 2
"""How often one sweep starts a run that fails."""

PARALLEL_ON_SLURM = 64
POLL_SECONDS = {"local": 0.2, "slurm": 5.0}
STOP_SECONDS = 60.0
"""How long to wait for runs after SIGTERM, so that they can save."""

_NO_LIMIT = 60 * 24 * 365  # minutes; submitit's own limit for a local process is two
_NO_END = 10**6  # times that a job resumes after its time is up; submitit's own limit is three


def sweep(
    config: StudyConfig,
    path: Path,
    plan: Plan,
    console: Console,
    overrides: Sequence[str] = (),
    more: Callable[[], Plan | None] = lambda: None,
) -> None:
    """Run all that is planned and not done yet, and what follows from it.

    A run that fails is tried once more, then reported, and does not stop the others.

    Args:
        config: of the study.
        path: the file it comes from.
        plan: its runs.
        console: where to report progress.
        overrides: ``key=value`` changes to that file, for readers of the plan.
        more: called once all of a plan was run; returns the plan to run next, or None. No other
            sweep works in the folder meanwhile.

    Raises:
        StepError: if data cannot be prepared.
        RunError: if an input of a run is missing and nothing makes it, or another sweep works in
            the study's folder.
        ConfigError: if the executor is not available here, or does not know a setting.
    """
    executor_of(config, plan.runs[0])  # refuses settings before anything is written
    with locked(config.folder / ".lock") as lock:
        _write_plan(config, path, plan, overrides)
        for step in preparations(config):
            say(console, f"{step.title} …")
            with progress.heard(partial(say, console), "Preparing data"):
                steps.attempt(step, config.folder / "prepare", lock)
        check_inputs(plan, pending(config, plan))
        tries: Counter[str] = Counter()
        with stoppable():
            _Sweep(config, plan, console, tries).run()
            while (following := more()) is not None:
                _write_plan(config, path, following, overrides)
                _Sweep(config, following, console, tries).run()


def _write_plan(config: StudyConfig, path: Path, plan: Plan, overrides: Sequence[str]) -> None:
    settings = dataclasses.asdict(config)
    write_plan(config.folder, path, plan.runs, plan.left_out, overrides, settings)


def preparations(config: StudyConfig) -> list[Step]:
    """The commands that make data. Each checks for existing output itself."""
    steps = []
    for i, line in enumerate(config.prepare):
        steps.append(Step(f"{i:02d}", f"Preparing data, {line}", prepared_by(line)))
    return steps


def pending(config: StudyConfig, plan: Plan) -> list[Run]:
    """The runs that are not done."""
    results = (read_result(config.folder, run) for run in plan.runs)
    return [result.run for result in results if result.state != "done"]


@dataclass(frozen=True)
class Slot:
    """The share of the processors or GPUs that one of the concurrent runs gets.

    Attributes:
        name: unique.
        environment: variables of the tool.
    """

    name: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Work(submitit.helpers.Checkpointable):
    """What a job does: one run, unless it is done. Requeued by Slurm, it resumes.

    Attributes:
        run: the run.
        study: folder of the study.
        tool: a row of `TOOLS`; None where tickets are made.
        slot: its share of the processors.
    """

    run: Run
    study: Path
    tool: str | None
    slot: "Slot"

    def __call__(self) -> None:
        run = self.run
        if submitit.JobEnvironment().cluster == "local":
            # submitit ignores SIGTERM, which Slurm sends to processes it resumes. Here it comes
            # from a sweep that stops, and has to reach the tool.
            signal.signal(signal.SIGTERM, _exit)
        with locked(lock_path(self.study, run.name), slot=self.slot.name) as lock:
            if read_result(self.study, run).state == "done":
                return
            search = run.kind == FIND
            # What failed may have left something broken: only a search resumes from there, which
            # checks what it finds and may have taken weeks.
            resumes = search or "error" not in steps.read_marker(self.study, run.name)
            step = Step(
                run.name,
                run.title,
                run.command,
                run.inputs,
                run.outputs,
                folder=None if search else run.folder,
                resumes=resumes,
                digest=run.digest,
            )
            measure = self._measure if self.tool else None
            with contextlib.suppress(StepError):  # the marker has it
                steps.attempt(step, self.study, lock, self.slot.environment, measure)

    def _measure(self) -> dict[str, float]:
        assert self.tool is not None
        try:
            return TOOLS[self.tool].measure(self.run.folder)
        except LthError as error:
            raise StepError(f"{self.run.title} ended without an error, but {error}") from None


_PATIENCE = 5.0
"""Seconds in which the result of a job that has ended may still appear."""


@dataclass(eq=False)
class _Active:
    """A run that works, or waits in a queue.

    Attributes:
        run: the run.
        job: None if an earlier sweep started it, and only its lock tells of it.
        slot: its share of the processors; None if none is free.
        missed_at: when it was first found to have ended without a result.
    """

    run: Run
    job: submitit.Job[None] | None
    slot: Slot | None
    missed_at: float | None = None

    def is_overdue(self) -> bool:
        """Whether its result has been missing for long enough to count as lost."""
        now = time.monotonic()
        self.missed_at = now if self.missed_at is None else self.missed_at
        return now - self.missed_at >= _PATIENCE


class _Sweep:
    def __init__(
        self, config: StudyConfig, plan: Plan, console: Console, tries: Counter[str]
    ) -> None:
        self.config = config
        self.folder = config.folder
        self.console = console
        self.slots = _slots(config)
        if config.executor == "slurm":
            submitit.SlurmJob.watcher = JobStates(self._say)
        self.results = {run.name: read_result(self.folder, run) for run in plan.runs}
        self.tries = tries
        left = [r.run for r in self.results.values() if r.state != "done"]
        self.waiting = [run for run in left if tries[run.name] < TRIES]
        self.active: list[_Active] = []
        self._spoken = time.monotonic()

    def run(self) -> None:
        self._say(self._summary())
        try:
            self._adopt()
            while self.waiting or self.active:
                self._collect()
                self._start()
                if self.active:
                    self._show_progress()
                    time.sleep(POLL_SECONDS[self.config.executor])
        finally:
            self._stop()

    def _show_progress(self) -> None:
        """Say what the runs are doing, one after another, so that the sweep is never silent."""
        if time.monotonic() - self._spoken < progress.QUIET_SECONDS:
            return
        self.active.append(self.active.pop(0))
        run = self.active[-1].run
        log = steps.tail(log_path(self.folder, run.name))
        patterns = TOOLS[self.config.tasks[run.task].tool].progress if run.trains else ()
        self._say(f"    {run.title}: {doing(log, patterns)}")

    def _jobs(self, run: Run) -> Path:
        return _jobs(self.config, run)

    def _adopt(self) -> None:
        """Find what an earlier sweep started and did not see the end of."""
        for run in list(self.waiting):
            lock = lock_path(self.folder, run.name)
            works = is_locked(lock)
            job = self._queued(run)
            if not works and job is None:
                continue
            free = self._free_slots()
            name = lock_notes(lock).get("slot") if works else None
            same = [slot for slot in free if slot.name == name]
            slot = next(iter(same + free), None)
            self.active.append(_Active(run, job, slot))
            self.tries[run.name] += 1
            self.waiting.remove(run)
            self._say(f"{run.title}: still runs, from an earlier start")

    def _queued(self, run: Run) -> submitit.Job[None] | None:
        """The job of a run in Slurm's queue, if there is one."""
        if self.config.executor != "slurm":
            return None
        for file in self._jobs(run).glob("*_submitted.pkl"):
            job: submitit.Job[None] = submitit.SlurmJob(
                self._jobs(run), file.name.removesuffix("_submitted.pkl")
            )
            if not job.done(force_check=True):
                return job
        return None

    def _start(self) -> None:
        for slot in self._free_slots():
            run = self._next()
            if run is None:
                return
            missing = [str(path) for path in run.inputs if not os.path.exists(path)]
            if missing:
                self._fail(run, f"it needs {', '.join(missing)}, which is not there")
                self._report(run)
                continue
            # Left by a job whose end no sweep saw.
            shutil.rmtree(self._jobs(run), ignore_errors=True)
            tool = self.config.tasks[run.task].tool if run.trains else None
            work = Work(run, self.folder, tool, slot)
            try:
                with ctrl_c_waits():
                    job = executor_of(self.config, run).submit(work)
            except FailedJobError as error:  # sbatch's own words
                raise RunError(f"{run.title} could not be submitted: {error}") from None
            self.active.append(_Active(run, job, slot))
            self.tries[run.name] += 1
            if self.config.executor == "local":
                self._say(f"{run.title} …")

    def _next(self) -> Run | None:
        """The first waiting run that can start, taken from those that wait: its needs are done.

        A training also starts while the search for its ticket goes on, once its files are there: a
        search writes each ticket atomically and does not change it again.

        Those that need what will not come any more are taken out, too: it failed, or was taken out.
        """
        done = {r.run.digest for r in self.results.values() if r.state == "done"}
        pending = {run.digest for run in self.waiting} | {a.run.digest for a in self.active}
        searching = {a.run.digest for a in self.active if a.run.kind == FIND}
        for run in list(self.waiting):
            lacks = set(run.needs) - done
            found = lacks <= searching and all(os.path.exists(path) for path in run.inputs)
            ready = not lacks or found
            if lacks <= pending and not ready:
                continue
            self.waiting.remove(run)
            if ready:
                return run
            pending.remove(run.digest)
        return None

    def _collect(self) -> None:
        for active in list(self.active):
            run, job = active.run, active.job
            if not (job is None or job.done()) or is_locked(lock_path(self.folder, run.name)):
                continue
            result = read_result(self.folder, run)
            stopped = job is None or "stopped" in steps.read_marker(self.folder, run.name)
            if result.state == "planned" and not stopped and not active.is_overdue():
                continue  # a queue's news may come before the files of a shared disk
            self.active.remove(active)
            if result.state == "planned" and stopped:  # by the queue: no failure
                self.tries[run.name] -= 1
                shutil.rmtree(self._jobs(run), ignore_errors=True)
                self._say(f"{run.title}: was stopped and resumes")
                self.waiting.insert(0, run)
                continue
            if result.state == "planned":
                self._fail(run, f"it ended without a result{_last_words(job) if job else ''}")
            shutil.rmtree(self._jobs(run), ignore_errors=True)
            self._report(run)

    def _fail(self, run: Run, error: str) -> None:
        marker = steps.read_marker(self.folder, run.name)
        steps.write_marker(self.folder, run.name, {**marker, "digest": run.digest, "error": error})

    def _report(self, run: Run) -> None:
        """Say how a run ended; if it failed, and was not tried twice, put it back."""
        result = read_result(self.folder, run)
        self.results[run.name] = result
        if result.state == "done":
            value = f", {run.metric} {result.value:.2f}" if run.metric else ""
            took = duration(result.seconds)
            self._say(f"{run.title}: done in {took}{value}; {self._summary()}")
        elif 0 < self.tries[run.name] < TRIES:
            self._say(f"{run.title}: failed, is tried once more")
            self.waiting.insert(0, run)
        else:
            self._say(f"{run.title}: failed. {result.problem}")

    def _stop(self) -> None:
        """End the jobs of this sweep that still work, where they are its own processes."""
        jobs = [active.job for active in self.active if active.job is not None]
        if not jobs:
            return
        if self.config.executor == "slurm":
            self._say(
                f"{len(jobs)} jobs stay in Slurm's queue (scancel ends them); the same command "
                "finds them again"
            )
            return
        for job in jobs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(job.job_id), signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and not all(job.done() for job in jobs):
            time.sleep(POLL_SECONDS["local"])

    def _free_slots(self) -> list[Slot]:
        taken = [active.slot for active in self.active]
        return [slot for slot in self.slots if slot not in taken]

    def _summary(self) -> str:
        return summary(self.results.values(), len(self.slots))

    def _say(self, text: str) -> None:
        self._spoken = time.monotonic()
        say(self.console, text)


def executor_of(config: StudyConfig, run: Run) -> submitit.AutoExecutor:
    """What submits a run. Each has a folder of its own: process numbers come again.

    Raises:
        ConfigError: if the executor is not available here, or does not know a setting.
    """
    settings: dict[str, Any] = {"timeout_min": _NO_LIMIT}
    if config.executor == "slurm":
        if shutil.which("sbatch") is None:
            raise ConfigError(
                "executor=slurm: expected Slurm's sbatch on the PATH, found none: start the study "
                "on a machine that submits jobs, or give executor=local"
            )
        given = {"partition": config.partition, "job_name": run.name, **config.slurm}
        settings = {f"slurm_{key}": value for key, value in given.items()}
    try:
        executor = submitit.AutoExecutor(
            _jobs(config, run), cluster=config.executor, slurm_max_num_timeout=_NO_END
        )
        executor.update_parameters(**settings)
    except (NameError, ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"executor={config.executor}: {error}") from None
    if config.executor == "slurm" and "timeout_min" not in config.slurm:
        raise ConfigError(
            "expected slurm.timeout_min, minutes that a job gets at a time, found none: "
            "submitit would ask for five. A run whose time is up saves, and resumes"
        )
    return executor


def _jobs(config: StudyConfig, run: Run) -> Path:
    return config.folder / "jobs" / config.executor / run.name


def _slots(config: StudyConfig) -> list[Slot]:
    """One slot per GPU, or one in all, or `parallel` slots; on Slurm the queue decides."""
    if config.executor == "slurm":
        return [Slot(f"{i}", {}) for i in range(config.parallel or PARALLEL_ON_SLURM)]
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",")[:count] if given else [f"{gpu}" for gpu in range(count)]
    parallel = config.parallel or max(1, count)
    if gpus:
        environments = [{"CUDA_VISIBLE_DEVICES": gpus[i % count]} for i in range(parallel)]
    else:
        # Together as many threads as there are cores.
        threads = f"{max(1, (os.cpu_count() or 1) // parallel)}"
        environments = [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}] * parallel
    return [Slot(f"{i}", environment) for i, environment in enumerate(environments)]


def _last_words(job: submitit.Job[None]) -> str:
    """The end of a job's logs, after the line that says best why it ended."""
    files = [file for file in (job.paths.stderr, job.paths.stdout) if file.is_file()]
    why = f": {steps.reason(files[0])}" if files else ", and left no log"
    return "\n".join([why, *(f"The end of {file.name}:\n{steps.tail(file)}" for file in files)])


def _exit(*_: object) -> None:
    sys.exit(EXIT_CODE)
