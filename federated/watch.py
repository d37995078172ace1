"""How far trials are, by what lies on disk: it works for those that another process runs."""

import time

from federated.learning.log_lines import RoundLine
from federated.lock import read_lock
from federated.trial import Trial

_TAIL_BYTES = 4096


def last_round(trial: Trial) -> RoundLine | None:
    """What a trial's server last said of its rounds; None if it said nothing yet."""
    try:
        with open(trial.log("server"), "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            return RoundLine.last_in(file.read())
    except OSError:
        return None


class Pace:
    """Tells of trials that are run. Those that run count as the share of their rounds that is done, so that a time left can
    be told before the first one ends."""

    def __init__(self, total: int, first: float | None = 0.0):
        """`first` trials were finished as the pace began; None: as many as are when a line is first asked for."""
        self._total, self._start, self._first = total, time.monotonic(), first

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def line(self, done: int, failed: int, running: list[Trial]) -> str:
        """`done`, `failed` and `running` of all trials, the running ones' rounds with their validation accuracies, how fast
        it goes and how long it takes."""
        rounds = [last_round(trial) for trial in running]
        finished = done + failed + sum(each.round / each.rounds for each in rounds if each is not None)
        if self._first is None:
            self._first = finished
        parts = [f"{done}/{self._total} trials done, {len(running)} running, {failed} failed"]
        if told := [f"{each.round}/{each.rounds} ({each.val_acc:.4f})" for each in rounds if each is not None]:
            parts.append(f"round (validation accuracy) {', '.join(told[:MOST_TOLD])}{', …' * (len(told) > MOST_TOLD)}")
        hours = self.seconds / 3600
        if (progress := finished - self._first) > 0 and hours > 0:
            left = (self._total - finished) * hours / progress * 3600
            parts.append(f"{progress / hours:.0f} trials an hour, {left:.0f} s left")
        return "; ".join(parts)


MOST_TOLD = 4  # trials whose rounds are in a line


def is_running(trial: Trial) -> bool:
    """Whether a live process holds the trial; cheaper than its state."""
    owner = read_lock(trial.directory)
    return owner is not None and owner.may_live()
