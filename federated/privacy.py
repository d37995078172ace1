"""How private user-level DP-FedAvg (McMahan et al., ICLR 2018) makes the global models of a trial."""

import functools
import logging
import math
from importlib import metadata

from federated.settings import Settings

PACKAGE = "dp-accounting"  # Google's
SAMPLING = "each client independently with equal chance (Poisson)"
NEIGHBOURS = "one client more or less"


def default_delta(settings: Settings) -> float:
    """1e-5, or the paper's num_clients^-1.1 if that is less."""
    return min(1e-5, settings.num_clients**-1.1)


def imports_of(settings: Settings) -> list[str]:
    """What `epsilon` imports, for a process that imports ahead: it takes a second."""
    return ["dp_accounting"] if settings.dp_noise_multiplier else []


@functools.cache
def epsilon(settings: Settings, delta: float) -> float:
    """The epsilon with which all global models of a trial together are (epsilon, `delta`)-differentially private, under
    SAMPLING and for NEIGHBOURS. Infinity without noise; NaN if the accountant is not installed."""
    if not settings.dp_noise_multiplier:
        return math.inf
    try:
        import dp_accounting
    except ImportError:
        return math.nan
    logging.getLogger("absl").setLevel(logging.ERROR)  # it names orders that it leaves out of the minimum
    round_event = dp_accounting.PoissonSampledDpEvent(
        settings.participants / settings.num_clients, dp_accounting.GaussianDpEvent(settings.dp_noise_multiplier)
    )
    return float(dp_accounting.rdp.RdpAccountant().compose(round_event, settings.rounds).get_epsilon(delta))


def description(settings: Settings) -> dict:
    """The entry of results.json on privacy; no entry if the trial is not private."""
    if settings.dp_clip is None:
        return {}
    delta = default_delta(settings)
    value = epsilon(settings, delta)
    is_known = math.isfinite(value)
    return {
        "privacy": {
            "epsilon": value if is_known else None,
            "delta": delta,
            "accountant": f"{PACKAGE} {metadata.version(PACKAGE)}, RDP" if is_known else None,
            "sampling": SAMPLING,
            "neighbours": NEIGHBOURS,
        }
    }
