"""FedAvg (McMahan et al., AISTATS 2017, Algorithm 1), and the parts that every algorithm has."""

import dataclasses
import typing

if typing.TYPE_CHECKING:
    import torch

    from federated.domains import Hparam
    from federated.learning.client import Client, TrainingClient


@dataclasses.dataclass
class Server:
    """What the server half of an algorithm works on. Vectors are float32 and as long as the flat model.

    broadcast       [broadcasts, size]: what every participant is sent; the first vector is the global weights
    state           [server_vectors, size]: the algorithm's own, zeros at first
    num_parameters  the first num_parameters entries of the weights are parameters, the others BatchNorm's statistics
    num_clients     of the federation
    samples, steps  [participants] of this round, in the order of their numbers: training samples, local steps
    """

    broadcast: "torch.Tensor"
    state: "torch.Tensor"
    num_parameters: int
    num_clients: int
    samples: typing.Any = None
    steps: typing.Any = None

    @property
    def weights(self) -> "torch.Tensor":
        return self.broadcast[0]

    @property
    def parameters(self) -> "torch.Tensor":
        return self.broadcast[0][: self.num_parameters]


class Fedavg:
    """Clients train on from the global weights; the server averages what they reach, by their number of samples.

    The other algorithms override what they change. `client` is what federated/learning/client.py says:
    a Client in `personalize` unless the algorithm trains_to_personalize, a TrainingClient elsewhere. `server` is a Server.
    """

    broadcasts = 1  # vectors the server sends to every participant
    uploads = 1  # vectors a participant sends back
    client_vectors = 0  # vectors a client keeps between rounds
    server_vectors = 0  # vectors the server keeps besides the broadcast ones
    optimizers = 1  # local optimizers of a client, each with moments of its own
    local_optimizers: tuple[str, ...] = ("adam", "sgd")  # those it is defined for, the default first
    takes_momentum = True  # whether SGD may have momentum
    keeps_moments = True  # whether moments may outlive a round
    personal = False  # whether each client ends up with a model of its own
    trains_to_personalize = False  # whether `personalize` gets a TrainingClient, whose training changes no state
    has_global_model = True  # whether the global weights are a model to be used
    pooled = False  # whether all data lies in one place
    uses_features = False  # whether it needs what goes into the classifier, the model's last linear layer
    # Of one's own algorithm, beside those of what it derives from. hparams_registry.py has those of the built-in ones.
    hyperparameters: typing.ClassVar[dict[str, "Hparam"]] = {}
    may_be_captured = True  # whether a GPU may replay client.backward (federated/learning/captured.py); False if it uses hooks

    def __init__(self, hparams: dict) -> None:
        self.hparams = hparams

    # The client half

    def train(self, client: "TrainingClient") -> None:
        """Local training, from the global weights, which client.weights holds as this is called."""
        for batch in client.batches():
            client.backward(batch)
            self.correct_gradient(client)
            client.step()

    def correct_gradient(self, client: "TrainingClient") -> None:
        """Change client.gradient [num_parameters], that of a batch's loss, before a step is made."""

    def loss(
        self, client: "TrainingClient", inputs: "torch.Tensor", logits: "torch.Tensor", labels: "torch.Tensor"
    ) -> "torch.Tensor":
        """The loss of a batch, a scalar."""
        from torch.nn import functional

        return functional.cross_entropy(logits, labels)

    def upload(self, client: "TrainingClient", updates: "torch.Tensor") -> None:
        """Fill `updates` [uploads, size] from what training has reached, and client.state for the next round."""
        updates[0].copy_(client.weights)

    def personalize(self, client: "Client") -> None:
        """Turn client.weights, which holds the global weights, into this client's own model."""

    # The server half

    def start(self, server: Server) -> None:
        """Set up server.state before the first round."""

    def weights(self, server: Server) -> list:
        """What each participant's uploads count in the sum that `step` gets [uploads or 1, participants]: the shares of
        the samples (line 8 of the server in Algorithm 1)."""
        return [server.samples / server.samples.sum()]

    def receive(self, server: Server, place: int, upload: "torch.Tensor") -> None:
        """Look at the upload [uploads, size] of the participant at `place` of server.samples, before `step`. The participants'
        come in their order."""

    def step(self, server: Server, average: "torch.Tensor") -> None:
        """Move `server` by `average` [uploads, size], the weighted sum of the participants' uploads."""
        server.weights.copy_(average[0])
