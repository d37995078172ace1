"""FedAvg (McMahan et al., AISTATS 2017, Algorithm 1)."""

import torch


class Fedavg:
    """Clients train on from the global weights; the server averages what they reach, by their number of samples.

    The other algorithms override what they change. Vectors are float32 and as long as the flat model.
    """

    broadcasts = 1  # vectors the server sends to every participant
    uploads = 1  # vectors a participant sends back

    def __init__(self, hparams: dict):
        self.hparams = hparams

    def upload(self, weights: torch.Tensor, updates: torch.Tensor):
        """Client: fill `updates` [uploads, size] from the `weights` [size] that local training reached."""
        updates[0].copy_(weights)

    def step(self, broadcast: torch.Tensor, average: torch.Tensor):
        """Server: move `broadcast` [broadcasts, size], whose first vector is the global weights, by the participants'
        `average` [uploads, size] of their updates, weighted by samples (line 8 of the server in Algorithm 1)."""
        broadcast[0].copy_(average[0])
