"""Seeds. Each is a function of its purpose, never of process, order or time."""

import hashlib


def seed_hash(*args: object, modulus: int = 10**8) -> int:
    """A whole number in [0, modulus) made from the text of `args`, the same on every machine."""
    return int(hashlib.sha256(str(args).encode()).hexdigest(), 16) % modulus


def stream_seed(*args: object) -> int:
    """The seed of one random stream, e.g. `stream_seed(trial_seed, client, round, "order")`.

    It has 63 bits, so that no two streams of a long trial with many clients get the same seed by chance.
    """
    return seed_hash(*args, modulus=2**63)
