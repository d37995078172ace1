"""Progress of trials, read from disk, so that another process may run them."""

import shutil
import sys
import threading
import time
import typing

from tqdm import tqdm

from federated.files import read_end
from federated.learning.log_lines import RoundLine
from federated.lock import is_held
from federated.options import ALL_LOCKED, FAILED, say, system_error_behind
from federated.running.exits import no_trial_can_start
from federated.running.supervisor import Failure, Outcome
from federated.trial import COMPLETE, FAILED_FOR_GOOD, INCOMPLETE, RUNNING, Trial

_TAIL_BYTES = 4096
_MAX_SHOWN = 4  # trials whose rounds a line shows
_REDRAW_SECONDS, _LINE_SECONDS = 1, 10


def last_round(trial: Trial) -> RoundLine | None:
    """The last progress line in the log of a trial's server; None if there is none yet."""
    try:
        return RoundLine.last_in(read_end(trial.log("server"), _TAIL_BYTES))
    except OSError:
        return None


class Pace:
    """Progress line with rate and ETA. A running trial counts by its finished rounds, so there is an ETA before the first
    trial ends."""

    def __init__(self, total: int, first: float | None = 0.0) -> None:
        """`first`: how many trials were finished at the start; None counts them at the first line."""
        self._total, self._start, self._first = total, time.monotonic(), first

    def add(self, trials: int) -> None:
        self._total += trials

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def line(self, done: int, failed: int, running: list[Trial]) -> str:
        """How many trials are done, running and failed, the running ones' rounds and validation accuracies, rate and ETA."""
        rounds = [each for each in map(last_round, running) if each is not None]
        finished = done + failed + sum(each.round / each.rounds for each in rounds)
        if self._first is None:
            self._first = finished
        parts = [f"{done}/{self._total} trials done, {len(running)} running, {failed} failed"]
        if texts := [f"{each.round}/{each.rounds} ({each.val_acc:.4f})" for each in rounds]:
            parts.append(f"round (validation accuracy) {', '.join(texts[:_MAX_SHOWN])}{', …' * (len(texts) > _MAX_SHOWN)}")
        hours = self.seconds / 3600
        if (progress := finished - self._first) > 0 and hours > 0:
            left = (self._total - finished) * hours / progress * 3600
            parts.append(f"{progress / hours:.0f} trials an hour, {left:.0f} s left")
        return "; ".join(parts)


class Progress:
    """Shows the progress of trials that this process runs. On a terminal it draws a bar each second; elsewhere it prints a
    line as each trial ends and every ten seconds."""

    def __init__(self, trials: typing.Collection[Trial]) -> None:
        self._waiting = {trial.directory: trial for trial in trials}
        self._total, self._done, self._failed, self._diverged, self._locked = len(trials), 0, 0, 0, 0
        self._pace = Pace(len(trials))
        self._bar: tqdm | None = None
        self._speaking, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._show_repeatedly, daemon=True)

    def __enter__(self) -> "Progress":
        try:
            self._thread.start()
        except RuntimeError as error:
            if (cause := system_error_behind(error)) is None:
                raise
            raise no_trial_can_start(cause) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def _show_repeatedly(self) -> None:
        on_terminal = sys.stderr.isatty()
        while not self._over.wait(_REDRAW_SECONDS if on_terminal else _LINE_SECONDS):
            running = [trial for trial in list(self._waiting.values()) if is_held(trial.directory)]
            line = self._pace.line(self._done, self._failed, running)
            with self._speaking:
                if not on_terminal:
                    say(line)
                    continue
                if self._bar is None:
                    self._bar = tqdm(total=self._total, leave=False, bar_format="{percentage:3.0f}%|{bar:20}| {desc}")
                self._bar.n = self._done + self._failed + self._locked
                self._bar.set_description_str(line)

    def add(self, trials: typing.Collection[Trial]) -> None:
        """Add trials that are run, too."""
        self._waiting |= {trial.directory: trial for trial in trials}
        self._total += len(trials)
        self._pace.add(len(trials))

    def report(self, trial: Trial, outcome: Outcome) -> None:
        """Count a trial that has ended, and print how it ended unless a bar shows that."""
        self._waiting.pop(trial.directory, None)
        if not isinstance(outcome, Failure):
            self._done += 1
            if not sys.stderr.isatty():
                ended = self._done + self._failed + self._locked
                left = self._pace.seconds / ended * (self._total - ended)
                self._say(f"{ended}/{self._total} trials, {left:.0f} s left: {trial.directory} done")
        elif outcome.is_locked():
            self._locked += 1
            self._say(f"{trial.directory} is left to the sweep that runs it: {(outcome.log or [outcome.reason])[-1]}")
        else:
            self._failed += 1
            self._diverged += outcome.is_final()
            self._say(f"{trial.directory} failed: {outcome} (see {trial.log(outcome.role)})")

    def _say(self, text: str) -> None:
        with self._speaking:
            if self._bar is None:
                say(text)
            else:
                self._bar.write(text, file=sys.stderr)

    def exit_code(self) -> int:
        """The exit code of the command that ran the trials. Prints how many failed."""
        if self._failed:
            diverged = (
                f", {self._diverged} of them because they diverged: tables leave out their settings" if self._diverged else ""
            )
            say(f"{self._failed} of {self._total} trials failed{diverged}.")
            return FAILED
        return ALL_LOCKED if self._locked else 0


def follow(states: typing.Callable[[], list[tuple[Trial, str]]]) -> None:
    """Print the progress of trials that other processes run until all are done or failed. `states()` reads their states
    again."""
    pace, on_terminal, printed = None, sys.stdout.isatty(), None
    while True:
        trials = states()
        pace = pace or Pace(len(trials), first=None)
        done = sum(state == COMPLETE for _, state in trials)
        running = [trial for trial, state in trials if state == RUNNING]
        failed = sum(state == FAILED_FOR_GOOD or (state == INCOMPLETE and bool(trial.failures())) for trial, state in trials)
        line = pace.line(done, failed, running)
        if on_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:<{width}}", end="", flush=True)
        elif line != printed:
            print(line, flush=True)
            printed = line
        if done + failed == len(trials):
            print(end="\n" * on_terminal)
            return
        time.sleep(_REDRAW_SECONDS if on_terminal else _LINE_SECONDS)
