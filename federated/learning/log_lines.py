"""The lines of a server's log that other processes read."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class RoundLine:
    """A trial's last round, and the accuracy of its global model on the test set and on the clients' validation samples."""

    round: int
    rounds: int
    test_acc: float
    val_acc: float

    def __str__(self) -> str:
        return f"round {self.round}/{self.rounds}: test accuracy {self.test_acc:.4f}, validation accuracy {self.val_acc:.4f}"

    @classmethod
    def last_in(cls, log: bytes) -> "RoundLine | None":
        """The last such line of a log, or of the end of one; None if there is none."""
        found = _ROUND_LINE.findall(log)
        return cls(int(found[-1][0]), int(found[-1][1]), float(found[-1][2]), float(found[-1][3])) if found else None


_ROUND_LINE = re.compile(rb"^round (\d+)/(\d+): test accuracy (\d\.\d+), validation accuracy (\d\.\d+)$", re.MULTILINE)
