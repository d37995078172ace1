"""Limits how many trials share a device. A trial's need of device memory is known only once it has run, so a trial that ran out
of it waits until it may run beside fewer."""

import collections
import pathlib

from federated.trial import Trial


class DeviceSharing:
    """The running trials, by device. Slots with the same remainder modulo the number of devices share a device."""

    def __init__(self, devices: int) -> None:
        self._devices = max(1, devices)
        self._running: dict[int, Trial] = {}
        self._beside: dict[int, int] = {}  # by slot: how many others shared the device when its trial began
        self._limits: dict[pathlib.Path, int] = {}  # beside how many others each trial that ran out of memory may run

    def next_start(self, waiting: collections.deque[Trial], slots: list[int]) -> tuple[Trial, int] | None:
        """Take the first trial of `waiting` that may start in one of the free `slots`, and return it with its slot."""
        for slot in slots:
            others = self._others(slot)
            allowed = [self._limits.get(trial.directory, len(others)) for trial in others]
            for index, trial in enumerate(waiting):
                if len(others) <= min([*allowed, self._limits.get(trial.directory, len(others))]):
                    del waiting[index]
                    return trial, slot
        return None

    def began(self, trial: Trial, slot: int) -> None:
        self._beside[slot] = len(self._others(slot))
        self._running[slot] = trial

    def ended(self, slot: int, lacked_memory: bool) -> int | None:
        """Note that the trial in `slot` has ended. If it lacked memory on a shared device, return beside how many others it may
        run from now on, else None."""
        trial = self._running.pop(slot)
        beside = max(self._beside.pop(slot), len(self._others(slot)))
        if not lacked_memory or not beside:
            return None
        self._limits[trial.directory] = min(beside - 1, self._limits.get(trial.directory, beside))
        return self._limits[trial.directory]

    def _others(self, slot: int) -> list[Trial]:
        return [trial for other, trial in self._running.items() if other % self._devices == slot % self._devices]
