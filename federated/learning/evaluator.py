"""Evaluates blocks of samples."""

import itertools
from collections.abc import Callable, Iterable

import torch
from torch.nn import functional

from federated.learning.device_data import DeviceData
from federated.learning.evaluation import Block
from federated.learning.local_model import LocalModel


def evaluate_blocks(
    blocks: Iterable[Block], model: LocalModel, data: DeviceData, load_weights: Callable[[int | None], None]
) -> list[torch.Tensor]:
    """Return [2, samples] for each block: losses, then whether each sample was classified correctly. `load_weights(client)`
    loads the client's own weights, and may train to get them; for None it loads the global ones. The results stay on the
    device, and this function does not wait for it."""
    results = []
    for client, blocks_of_client in itertools.groupby(blocks, key=lambda block: block.client):
        load_weights(client)
        model.module.eval()
        with torch.inference_mode():
            for block in blocks_of_client:
                inputs, labels = data.gather(block.is_test, torch.from_numpy(block.indices))
                with model.autocast():
                    logits = model(inputs)
                logits = logits.float()
                losses = functional.cross_entropy(logits, labels, reduction="none")
                results.append(torch.stack([losses, logits.argmax(1) == labels]))
    return results
