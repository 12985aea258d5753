"""How jobs of Slurm are: from its accounts, or from its queue where it keeps none.

submitit asks `sacct` alone. Without accounts that warns at each look, and a job that ends without a
result is waited for forever.
"""

import getpass
import subprocess
import time
from collections.abc import Callable

from submitit.slurm.slurm import SlurmInfoWatcher

_LONGEST_SECONDS = 600  # between two looks; submitit's own, too: it begins with two seconds
_OVER = "COMPLETED"


class JobStates(SlurmInfoWatcher):
    """What `submitit.SlurmJob` learns of its jobs.

    Args:
        say: reports, once each, that there are no accounts and that the queue cannot be asked.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(_LONGEST_SECONDS)
        self.say = say
        self.accounts = True
        self.failing = False

    def update(self) -> None:
        """Look up all jobs that are not known to be over."""
        command = self._make_command()
        if command is None:
            return
        self._num_calls += 1
        self._last_status_check = time.time()
        jobs = self._registered - self._finished
        if self.accounts:
            try:
                self._info_dict.update(self.read_info(_output(command)))
            except (OSError, subprocess.CalledProcessError) as error:
                self.accounts = False
                self.say(
                    f"Slurm keeps no accounts here ({_why(error)}): jobs are looked up in its "
                    "queue, with squeue"
                )
        if not self.accounts:
            self._look_into_the_queue(jobs)
        self._finished.update(job for job in jobs if self.is_done(job, mode="cache"))

    def _look_into_the_queue(self, jobs: set[str]) -> None:
        command = ["squeue", "--noheader", "--format=%i %T", f"--user={getpass.getuser()}"]
        try:
            lines = _output(command).splitlines()
        except (OSError, subprocess.CalledProcessError) as error:
            if not self.failing:
                self.say(f"squeue cannot be asked ({_why(error)}): jobs count as running meanwhile")
            self.failing = True
            return
        self.failing = False
        states = dict(line.split()[:2] for line in lines if len(line.split()) > 1)
        self._info_dict.update({job: {"State": states.get(job, _OVER)} for job in jobs})


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _why(error: OSError | subprocess.CalledProcessError) -> str:
    said = (error.stderr or "").strip() if isinstance(error, subprocess.CalledProcessError) else ""
    return said.splitlines()[-1] if said else str(error)
