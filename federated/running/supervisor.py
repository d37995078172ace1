"""Run trials on this machine: start their processes, watch them, and report how each trial ended."""

import contextlib
import dataclasses
import signal
import socket
import sys
import time
import typing
from collections import Counter, deque
from multiprocessing.connection import wait as wait_for_any

from tqdm import tqdm

from federated.files import bound_log, read_end
from federated.lock import Lock, LockedError
from federated.running import resources
from federated.running.channel import RunningTime
from federated.running.device_sharing import DeviceSharing
from federated.running.exits import (
    DEVICE_MEMORY_EXIT,
    DIVERGED_EXIT,
    LOCKED_EXIT,
    LOST_PEER_EXIT,
    OUT_OF_MEMORY_EXIT,
    UNKNOWN_EXIT,
    is_accident,
    lacks_room,
    meaning_of,
    system_error_exit,
    with_hint,
)
from federated.running.listener import JOIN_VARIABLE, TRIAL_VARIABLE
from federated.running.processes import LOCK_VARIABLE, Environment, Process, Start, trial_commands
from federated.settings import RunOptions
from federated.trial import Trial

# How long the processes of an ending trial may take to end by themselves
GRACE_SECONDS = 1.0
# How often to check for silence; ends are noticed at once
POLL_SECONDS = 1.0
_TAIL_BYTES = 1 << 16  # of a log


class Done:
    """The trial is done."""


@dataclasses.dataclass
class Failure:
    """Why a trial ended before it was done."""

    role: str
    reason: str
    exitcode: int | None = None
    log: list[str] = dataclasses.field(default_factory=list)

    def is_locked(self) -> bool:
        """True if another sweep runs the trial."""
        return self.role == "server" and self.exitcode == LOCKED_EXIT

    def is_final(self) -> bool:
        """True if the same trial would fail in the same way again."""
        return self.exitcode == DIVERGED_EXIT

    def lacks_room(self) -> bool:
        """True if the trial may well succeed beside fewer others."""
        return lacks_room(self.exitcode)

    def lacks_device_memory(self) -> bool:
        """True if its device had too little free memory for it."""
        return self.exitcode == DEVICE_MEMORY_EXIT

    def is_accident(self) -> bool:
        """True if the same trial may well succeed next time: it was killed, fell silent or lost a peer."""
        return is_accident(self.exitcode)

    def __str__(self) -> str:
        last = f": {self.log[-1]}" if self.log else ""
        return f"{self.role} {self.reason}{last}"


Outcome = Done | Failure
ReportOutcome = typing.Callable[[Trial, Outcome], typing.Iterable[Trial] | None]  # returns trials that are to be run, too


class RunningTrial:
    """The processes of one trial, from start to end."""

    def __init__(self, trial: Trial, start: Start, gpu: dict[str, str], client_processes: int, run: RunOptions) -> None:
        """Start the processes, each with `gpu` added to its environment. Raises LockedError, and changes nothing, if another
        process runs the trial."""
        self.trial = trial
        self._timeout = run.timeout
        trial.directory.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(trial.directory)
        self._oom_kills = resources.oom_kills()
        self._processes: dict[str, Process] = {}
        self._exit_codes: dict[str, int | None] = {}
        try:
            trial.prepare()
            self._start(start, gpu, client_processes, run)
        except BaseException:
            self.end()
            raise
        self._time = RunningTime()
        self._heard, self._touched = self._time(), 0

    def _start(self, start: Start, gpu: dict[str, str], client_processes: int, run: RunOptions) -> None:
        of_server, of_clients = socket.socketpair()
        with of_server, of_clients:
            for role, command in trial_commands(self.trial, run.host, client_processes, run).items():
                environment: Environment = {**gpu, TRIAL_VARIABLE: self._lock.id}
                if role == "server":
                    environment[LOCK_VARIABLE] = self._lock.fileno()
                if run.host is None:
                    environment[JOIN_VARIABLE] = (of_server if role == "server" else of_clients).fileno()
                self.trial.log(role).write_text("")
                self._processes[role] = start(command, self.trial.log(role), environment)

    def sentinels(self) -> list[int]:
        """File descriptors of the processes that run, readable as they end."""
        return [process.sentinel for role, process in self._processes.items() if role not in self._exit_codes]

    def poll(self, ready: typing.Collection = ()) -> Outcome | None:
        """How the trial ended; None while it runs. `ready` are the sentinels that are readable."""
        self._note_exits(ready)
        self._bound_logs()
        if any(code not in (0, UNKNOWN_EXIT) for code in self._exit_codes.values()):
            # One death makes others follow: wait a moment, so that the first one is among those that have ended.
            self._wait_for_others(until=lambda: LOST_PEER_EXIT not in self._exit_codes.values())
            return self._failure()
        if "server" in self._exit_codes:
            self._wait_for_others(until=lambda: False)  # the server told them to stop
            if self.trial.is_done():
                return Done()
            if UNKNOWN_EXIT in self._exit_codes.values():
                return self._failure()
            return Failure("server", "ended before the trial was done", log=self._log_tail("server"))
        try:
            touched = self.trial.log("server").stat().st_mtime_ns  # the server's heartbeat, by a file server's clock
        except OSError as error:
            return Failure("server", f"lost its directory ({error.strerror})", system_error_exit(error))
        if touched != self._touched:
            self._heard, self._touched = self._time(), touched
        if self._time() - self._heard > self._timeout + GRACE_SECONDS:
            return Failure("server", f"was silent for {self._timeout:g} s", log=self._log_tail("server"))
        return None

    def _note_exits(self, ready: typing.Collection) -> None:
        for role, process in self._processes.items():
            if process.sentinel in ready:
                self._exit_codes[role] = process.exitcode

    def _bound_logs(self) -> None:
        for role in self._processes:
            with contextlib.suppress(OSError):  # the trial's directory is gone
                bound_log(self.trial.log(role))

    def _wait_for_others(self, until: typing.Callable[[], bool]) -> None:
        deadline = time.monotonic() + GRACE_SECONDS
        while (sentinels := self.sentinels()) and not until():
            ready = wait_for_any(sentinels, max(0, deadline - time.monotonic()))
            if not ready:
                break
            self._note_exits(ready)

    def _failure(self) -> Failure:
        """The failure of the process that most likely failed first: one that lost its peer only followed."""
        role, code = max(self._exit_codes.items(), key=lambda each: (each[1] not in (0, LOST_PEER_EXIT), each[1] != 0))
        assert code is not None
        reason = meaning_of(code)
        if code == -signal.SIGKILL and resources.oom_kills() > self._oom_kills:
            reason, code = "was killed by SIGKILL, as the system ran out of memory", OUT_OF_MEMORY_EXIT
        return Failure(role, reason, code, self._log_tail(role))

    def _log_tail(self, role: str, lines: int = 20) -> list[str]:
        with contextlib.suppress(OSError):
            return read_end(self.trial.log(role), _TAIL_BYTES).decode(errors="replace").splitlines()[-lines:]
        return []

    def kill(self) -> None:
        for process in self._processes.values():
            process.kill()

    def end(self) -> None:
        """Kill the processes that still run, also those that the trial's processes have started, and leave nothing but the
        trial's directory."""
        self.kill()
        for process in self._processes.values():
            _ = process.exitcode  # waits
            process.close()
        self._bound_logs()
        self._lock.release(self.trial.remove_half_written)


Begin = typing.Callable[[Trial, int], RunningTrial]


def run_trials(
    trials: typing.Iterable[Trial], begin: Begin, jobs: int, retries: int, report: ReportOutcome, devices: int = 0
) -> None:
    """Run `trials`, `jobs` at a time: the loop that all local launchers share.

    begin(trial, slot) starts a trial in a slot from 0 to jobs - 1 that no other running one has. Slots with the same remainder
    modulo `devices` share a device. A trial that fails by accident is started up to `retries` times more. One that fails
    because the machine, or its device, has no room for so many is started again beside fewer.
    report(trial, outcome) is called once a trial has ended for good; the trials that it returns are run, too. However this
    function ends, no process of a trial outlives it.
    """
    waiting, running, attempts = deque(trials), dict[int, RunningTrial](), Counter[tuple[str, int]]()
    limit, limits = jobs, dict[int, int]()  # of trials at once, now and by slot as its trial began
    sharing = DeviceSharing(devices)
    try:
        while waiting or running:
            while len(running) < limit and (start := sharing.next_start(waiting, sorted(set(range(jobs)) - running.keys()))):
                trial, slot = start
                if trial.is_done():  # another sweep has done it by now
                    waiting.extend(report(trial, Done()) or ())
                    continue
                try:
                    running[slot], limits[slot] = begin(trial, slot), limit
                    sharing.began(trial, slot)
                except LockedError as error:
                    waiting.extend(report(trial, Failure("server", str(error), LOCKED_EXIT)) or ())
                except OSError as error:
                    failure = Failure("server", f"could not be started: {with_hint(error)}", system_error_exit(error))
                    if running and failure.lacks_room():
                        waiting.appendleft(trial)
                        limit = _lowered(limit, len(running), trial, failure)
                    else:
                        waiting.extend(report(trial, failure) or ())
            sentinels = [sentinel for one in running.values() for sentinel in one.sentinels()]
            ready = wait_for_any(sentinels, timeout=POLL_SECONDS)
            for slot, one in list(running.items()):
                outcome = one.poll(ready)
                if outcome is None:
                    continue
                del running[slot]
                one.end()
                trial = one.trial
                beside = sharing.ended(slot, isinstance(outcome, Failure) and outcome.lacks_device_memory())
                if isinstance(outcome, Failure):
                    if not outcome.is_locked():
                        with contextlib.suppress(OSError):  # a full disk, a vanished directory: the report says so
                            trial.record_failure(outcome.role, outcome.reason, outcome.log, outcome.is_final())
                    if beside is not None:
                        waiting.append(trial)
                        _put_off(trial, f"it runs beside at most {beside} others on its device", outcome)
                        continue
                    if outcome.lacks_room() and limits[slot] > 1:
                        waiting.append(trial)
                        limit = _lowered(limit, len(running), trial, outcome)
                        continue
                    attempts[str(trial.directory), trial.settings.rounds] += 1
                    if outcome.is_accident() and attempts[str(trial.directory), trial.settings.rounds] <= retries:
                        waiting.append(trial)
                        continue
                waiting.extend(report(trial, outcome) or ())
    finally:
        for one in running.values():
            one.kill()
        for one in running.values():
            one.end()


def _lowered(limit: int, running: int, trial: Trial, failure: Failure) -> int:
    """The limit of trials at once after `trial` found no room beside `running` others. Prints it."""
    lowered = min(limit, max(1, running))
    _put_off(trial, f"at most {lowered} trials run at once now", failure)
    return lowered


def _put_off(trial: Trial, until: str, failure: Failure) -> None:
    tqdm.write(f"{trial.directory} is put off, {until}: {failure}", file=sys.stderr)
