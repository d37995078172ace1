"""Which samples each model is evaluated on, and the metrics that are computed from the results.

Evaluation goes in fixed blocks, so that its bits do not depend on which process evaluates which. Each block has a row of
memory: the losses of its samples, then whether each was classified correctly. Sums are float64 in the order of the samples.
"""

import dataclasses

import numpy as np

from federated.data.partition import ClientSplit

BLOCK = 512  # samples


@dataclasses.dataclass(frozen=True)
class Block:
    """Samples of the test or the training set, by their indices, that the model of `client` is evaluated on, or the global
    model if that is None."""

    is_test: bool
    indices: np.ndarray
    client: int | None


class EvaluationPlan:
    """All blocks of an evaluation. The global model is evaluated on the test set and on what clients hold out. If the
    algorithm is personal, it is evaluated on the test set only, and each client's own model on what the client holds out
    and on its share of the test set. `test` has the sorted indices of the test set's samples, all or those of the clients."""

    def __init__(self, splits: list[ClientSplit], test: np.ndarray, personal: bool) -> None:
        wanted: list[tuple[bool, np.ndarray, int | None]] = [(True, test, None)]
        if personal:
            for client, each in enumerate(splits):
                wanted += [(False, each.val, client), (True, each.test, client)]
        else:
            wanted.append((False, np.concatenate([each.val for each in splits]), None))
        self.blocks = [
            Block(is_test, indices[start : start + BLOCK], client)
            for is_test, indices, client in wanted
            for start in range(0, len(indices), BLOCK)
        ]

        # The places of each result's losses in the flattened rows, and how many samples of it each client has
        places = [np.arange(len(block.indices)) + row * 2 * BLOCK for row, block in enumerate(self.blocks)]

        def places_of(is_test: bool, personal: bool):
            chosen = [
                places[row]
                for row, block in enumerate(self.blocks)
                if block.is_test == is_test and (block.client is not None) == personal
            ]
            return np.concatenate([np.empty(0, int), *chosen])

        self._test = places_of(True, False)
        self._val, self._val_sizes = places_of(False, personal), [len(each.val) for each in splits]
        tests = np.concatenate([each.test for each in splits])
        self._local_test = places_of(True, True) if personal else self._test[np.searchsorted(test, tests)]
        self._local_test_sizes = [len(each.test) for each in splits]

    def blocks_of(self, process: int, processes: int) -> list[int]:
        """Return the numbers of the blocks that `process` evaluates. All blocks of a client's own model go to one process."""
        return [
            number
            for number, block in enumerate(self.blocks)
            if (number if block.client is None else block.client) % processes == process
        ]

    def metrics(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return test [2], val [2, clients] and local_test [2, clients]: mean losses, then accuracies, NaN without samples."""
        values = rows.reshape(-1)

        def per_client(places: np.ndarray, sizes: list[int]):
            clients = np.repeat(np.arange(len(sizes)), sizes)
            sums = [
                np.bincount(clients, values[places + offset].astype(np.float64), minlength=len(sizes)) for offset in (0, BLOCK)
            ]
            with np.errstate(invalid="ignore"):
                return np.array(sums) / sizes

        test = np.stack([values[self._test], values[self._test + BLOCK]]).astype(np.float64)
        return {
            "test": test.sum(axis=1) / len(self._test),
            "val": per_client(self._val, self._val_sizes),
            "local_test": per_client(self._local_test, self._local_test_sizes),
        }
