"""Start, watch and end the processes of trials.

Every process that is started here ends when the process that started it does, however that ends: it holds one end of
something whose other end only its parent holds, and leaves when that is closed.
"""

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.util import get_temp_dir

from federated import machine, warm
from federated.lock import Lock, Locked
from federated.options import USAGE_ERROR, Parser, UsageError, command_line, directory, real
from federated.running.channel import PeerLostError
from federated.running.listener import is_remote, remove_socket, unix_address
from federated.trial import Diverged, Trial
from federated.version import HERE

PARENT_VARIABLE = "FEDERATED_PARENT_FD"
# The pid of the process that took the trial's lock for the server it starts
GIVER_VARIABLE = "FEDERATED_LOCK_GIVER"

MOST_PROCESSES = 1024  # of one trial


def end_with_parent(clean_up):
    """Called by a trial's process as it starts: when its parent ends, call `clean_up` and end at once."""
    parent = multiprocessing.parent_process()
    sentinel = parent.sentinel if parent is not None else os.environ.pop(PARENT_VARIABLE, None)
    if sentinel is None:  # started by hand
        return

    def watch():
        wait_for_any([int(sentinel)])
        try:
            clean_up()
        finally:
            os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


# How a trial's process ends, besides 0, USAGE_ERROR and what Python itself has
LOCKED_EXIT, LOST_PEER_EXIT, DIVERGED_EXIT = 3, 4, 5
SYSTEM_ERROR_EXIT = 64  # and more: an error of the operating system, such as a full disk, by its number
OUT_OF_MEMORY_EXIT = SYSTEM_ERROR_EXIT + errno.ENOMEM


def exit_code_of(work) -> int:
    """Do the `work` of a trial's process. What ends it becomes its last line on stderr and the exit code."""
    try:
        work()
        return 0
    except UsageError as error:
        reason, code = f"{pathlib.Path(sys.argv[0]).name}: error: {error}", USAGE_ERROR
    except Locked as error:
        reason, code = error, LOCKED_EXIT
    except PeerLostError as error:
        reason, code = error, LOST_PEER_EXIT
    except Diverged as error:
        reason, code = error, DIVERGED_EXIT
    except OSError as error:
        reason, code = error, SYSTEM_ERROR_EXIT + (error.errno or 0)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)):
            raise
        reason, code = f"out of memory: {str(error).splitlines()[0] if str(error) else 'none left'}", OUT_OF_MEMORY_EXIT
    with contextlib.suppress(OSError):  # on a full disk neither
        print(reason, file=sys.stderr, flush=True)
    return code


def meaning_of(code: int) -> str:
    """What the exit code of a trial's process says."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    if code == DIVERGED_EXIT:
        return "diverged"
    if code == OUT_OF_MEMORY_EXIT:
        return "ran out of memory"
    if SYSTEM_ERROR_EXIT < code < 128:
        return f"ended with the system's error {os.strerror(code - SYSTEM_ERROR_EXIT)!r}"
    return f"ended with exit code {code}"


def add_run_arguments(parser: Parser):
    """The options that a trial's server and clients share, which say how they run and not what they compute."""
    parser.add_argument(
        "--data_dir",
        type=directory,
        default="data",
        metavar="DIR",
        help="where data sets lie or are downloaded to (default: data)",
    )
    parser.add_argument(
        "--timeout",
        type=real(0, 1e6, above=True),
        default=600.0,
        metavar="SECONDS",
        help="a process silent for so long has failed (default: 600)",
    )


def add_server_arguments(parser: Parser):
    """Those that the server alone has."""
    parser.add_argument(
        "--checkpoint_seconds",
        type=real(0, 1e6),
        default=10.0,
        metavar="SECONDS",
        help="least time between checkpoints, which are made at round ends; 0: after each round (default: 10)",
    )
    parser.add_argument(
        "--save_model",
        action="store_true",
        help="keep the global model of the best validation accuracy as model.pt, a state_dict, in the trial's directory",
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="write event files, by which `tensorboard --logdir DIR` shows trials as they run (needs pip install tensorboard)",
    )


# Ways to start one of the scripts. Each returns a handle with sentinel (readable once the process has ended),
# exitcode (a signal as a negative number) and kill().


class Cold:
    """A new Python, as a user would start it by hand."""

    def __init__(self, command: list[str], log: pathlib.Path, environment: dict):
        ours, theirs = socket.socketpair()
        with open(log, "ab") as output, theirs:
            os.set_inheritable(theirs.fileno(), True)
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, **environment, PARENT_VARIABLE: str(theirs.fileno())},
            )
        self._socket = ours
        self.sentinel = ours.fileno()

    @property
    def exitcode(self):
        return self._process.wait()

    def kill(self):
        self._process.kill()

    def close(self):
        self._socket.close()


class Warm:
    """A fork of a process that has imported what trials need."""

    _context = multiprocessing.get_context("forkserver")

    @classmethod
    def preload(cls, modules: list[str]):
        """Start the process to fork from, which imports `modules`. It looks for them where PYTHONPATH says and in no
        current directory, which may hold another version, and passes over what it does not find."""
        cls._context.set_forkserver_preload(["__main__", warm.__name__, *modules])
        before = dict(os.environ)
        path = os.pathsep.join(filter(None, [str(HERE), before.get("PYTHONPATH")]))
        os.environ.update({"PYTHONPATH": path, "PYTHONSAFEPATH": "1", warm.DIRECTORY_VARIABLE: get_temp_dir()})
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def __init__(self, command: list[str], log: pathlib.Path, environment: dict):
        self._process = self._context.Process(target=warm.run_script, args=(command, log, environment))
        self._process.start()
        self.sentinel = self._process.sentinel

    @property
    def exitcode(self):
        self._process.join()
        return self._process.exitcode

    def kill(self):
        self._process.kill()

    def close(self):
        self._process.close()


def script_command(script: str, *arguments) -> list[str]:
    """The command line that runs one of the project's scripts with this Python."""
    return [sys.executable, str(HERE / script), *map(str, arguments)]


def trial_commands(trial: Trial, address: str, client_processes: int, args) -> dict[str, list[str]]:
    """{role: command} of a trial's processes, each a list of arguments. The server comes first. `args` are options as
    add_run_arguments and add_server_arguments have them."""
    shared = ("--host", address, *command_line(add_run_arguments, args))
    of_server = ("--client_processes", client_processes, *command_line(add_server_arguments, args))
    commands = {"server": script_command("server_benchmark.py", *trial.server_arguments(), *shared, *of_server)}
    for process in range(client_processes):
        commands[f"client_process_{process}"] = script_command("client_benchmark.py", *shared, "--process", process)
    return commands


@dataclasses.dataclass
class Failure:
    """Why a trial ended before it was done."""

    role: str
    reason: str
    exitcode: int | None = None
    log: list[str] = dataclasses.field(default_factory=list)

    def is_locked(self) -> bool:
        """Whether another sweep runs the trial."""
        return self.exitcode == LOCKED_EXIT

    def is_accident(self) -> bool:
        """Whether the same trial may well succeed next time: it was killed, fell silent or lost a peer."""
        return self.exitcode is None or self.exitcode < 0 or self.exitcode in (LOST_PEER_EXIT, OUT_OF_MEMORY_EXIT)

    def __str__(self):
        last = f": {self.log[-1]}" if self.log else ""
        return f"{self.role} {self.reason}{last}"


class RunningTrial:
    """The processes of one trial, from start to end."""

    def __init__(self, trial: Trial, start, client_processes: int, args):
        """`args` are sweep.py's. Raises Locked where another process runs the trial, which is left as it is."""
        self.trial = trial
        self.timeout = args.timeout
        trial.directory.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(trial.directory)
        self._address = args.host or unix_address(str(trial.directory.resolve()))
        self._oom_kills = machine.oom_kills()
        self.handles = {}
        self._ended = {}
        try:
            trial.prepare()
            for role, command in trial_commands(trial, self._address, client_processes, args).items():
                trial.log(role).write_text("")
                self.handles[role] = start(command, trial.log(role))
        except BaseException:
            self.end()
            raise

    def sentinels(self):
        return [handle.sentinel for role, handle in self.handles.items() if role not in self._ended]

    def look(self, ready=()) -> Failure | bool | None:
        """What came of it: None while it runs, True when it is done, a Failure else. `ready` are sentinels that fired."""
        self._note_ended(ready)
        if any(self._ended.values()):
            # One death brings others with it: give them a moment, so that the first cause is among those that ended.
            self._wait_for_others(until=lambda: LOST_PEER_EXIT not in self._ended.values())
            return self._failure()
        if "server" in self._ended:
            self._wait_for_others(until=lambda: False)  # it told them to stop
            if self.trial.is_done():
                return True
            return Failure("server", "ended before the trial was done", log=self._tail("server"))
        try:
            silence = time.time() - self.trial.log("server").stat().st_mtime  # a sign of life is a touch of the log
        except OSError as error:
            return Failure("server", f"lost its directory ({error.strerror})", SYSTEM_ERROR_EXIT + error.errno)
        if silence > self.timeout + GRACE_SECONDS:
            return Failure("server", f"was silent for {self.timeout:g} s", log=self._tail("server"))
        return None

    def _note_ended(self, ready):
        for role, handle in self.handles.items():
            if handle.sentinel in ready:
                self._ended[role] = handle.exitcode

    def _wait_for_others(self, until):
        deadline = time.monotonic() + GRACE_SECONDS
        while (sentinels := self.sentinels()) and not until():
            ready = wait_for_any(sentinels, max(0, deadline - time.monotonic()))
            if not ready:
                break
            self._note_ended(ready)

    def _failure(self):
        def likeness_to_a_cause(item):
            code = item[1]
            return code not in (0, LOST_PEER_EXIT), code != 0

        role, code = max(self._ended.items(), key=likeness_to_a_cause)
        reason = meaning_of(code)
        if code == -signal.SIGKILL and machine.oom_kills() > self._oom_kills:
            reason += ", as the system ran out of memory"
        return Failure(role, reason, code, self._tail(role))

    def _tail(self, role, lines=20):
        with contextlib.suppress(OSError):
            return self.trial.log(role).read_text(errors="replace").splitlines()[-lines:]
        return []

    def kill(self):
        for handle in self.handles.values():
            handle.kill()

    def end(self):
        """Kill what still runs and leave nothing but the trial's directory."""
        self.kill()
        for handle in self.handles.values():
            _ = handle.exitcode
            handle.close()
        self._lock.release(self.trial.remove_half_written)
        if not is_remote(self._address):
            remove_socket(self._address)


class Interrupted(BaseException):
    """A signal asked this process to end."""

    def __init__(self, signum: int):
        self.signum = signum


def interrupt_on_signals(message: str):
    """Raise Interrupted on the first SIGINT, SIGTERM or SIGHUP, after telling so. Further ones change nothing: what follows
    is killing the trials' processes and tidying up, which is as fast as ending without."""

    def interrupt(signum, frame):
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"{signal.Signals(signum).name}: {message}", file=sys.stderr, flush=True)
        raise Interrupted(signum)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for each in signals:
        signal.signal(each, interrupt)


# How long the processes of a trial that ends get to end by themselves.
GRACE_SECONDS = 1.0


def run_trials(trials, begin, jobs: int, retries: int, report):
    """Run `trials`, `jobs` at a time: the loop that all local launchers share.

    begin(trial, place) starts one and returns its RunningTrial; no two that run have the same place, from 0 to jobs - 1.
    report(trial, outcome) is told of each outcome, which is True or a Failure. What runs is ended however this is left.
    """
    waiting, running, attempts = deque(trials), {}, Counter()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                trial = waiting.popleft()
                if trial.is_done():  # another sweep did it meanwhile
                    report(trial, True)
                    continue
                place = min(set(range(jobs)) - running.keys())
                try:
                    running[place] = begin(trial, place)
                except Locked:
                    report(trial, Failure("server", "is run by another sweep", LOCKED_EXIT))
                except OSError as error:
                    report(trial, Failure("server", f"could not be started: {error}", SYSTEM_ERROR_EXIT + error.errno))
            ready = wait_for_any([s for one in running.values() for s in one.sentinels()], timeout=POLL_SECONDS)
            for place, one in list(running.items()):
                outcome = one.look(ready)
                if outcome is None:
                    continue
                del running[place]
                one.end()
                trial = one.trial
                attempts[trial.directory] += 1
                if outcome is not True:
                    if not outcome.is_locked():
                        with contextlib.suppress(OSError):  # a full disk, a vanished directory: the screen tells
                            trial.record_failure(outcome.role, outcome.reason, outcome.log)
                    if outcome.is_accident() and attempts[trial.directory] <= retries:
                        waiting.append(trial)
                        continue
                report(trial, outcome)
    finally:
        for one in running.values():
            one.kill()
        for one in running.values():
            one.end()


# How often silence is looked for; ends are noticed at once.
POLL_SECONDS = 1.0
