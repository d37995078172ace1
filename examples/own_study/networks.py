"""A recurrent network over the rows of a sample."""

from torch import nn


class Rows(nn.Module):
    """A GRU reads the rows of samples [samples, 1, rows, columns] or [samples, rows, columns]; its last state is classified."""

    def __init__(self, columns: int, classes: int, dropout_rate: float, units: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(columns, units, batch_first=True)
        self.dropout = nn.Dropout(dropout_rate)
        self.classifier = nn.Linear(units, classes)

    def forward(self, samples):
        states, _ = self.gru(samples.squeeze(1) if samples.ndim == 4 else samples)
        return self.classifier(self.dropout(states[:, -1]))
