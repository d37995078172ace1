"""The part `at_once`: trials an hour, by how many run at once on the device."""

import collections

from common import device_memory, launch, megabytes, places

# model: (trials at once, samples of each of two clients, rounds)
WORK = {"lenet": ((1, 2, 4, 8, 16), 1000, 100), "resnet18": ((1, 2, 4), 500, 3)}
TINY = {"lenet": ((1, 2), 40, 1)}


def rows(device, tiny):
    for model, (numbers, samples, rounds) in (TINY if tiny else WORK).items():
        for at_once in numbers:
            trials = at_once + max(2, at_once)
            options = ["--model_arch", model, "--rounds", rounds, "--samples_per_client", samples]
            options += ["--num_hparams", 1, "--num_trials", trials]
            options += ["--trials_per_device", at_once, "--jobs", at_once, "--client_processes", 1]
            with places(2 * samples, 200 if tiny else 1000) as (data_dir, output_dir), device_memory(device) as peak:
                seconds, results = launch(data_dir, output_dir, device, *options)
                ended = sorted((directory / "done").stat().st_mtime for directory in results)
            # Between the ends of two trials, so that starting up does not count
            rate = 3600 * (trials - at_once) / (ended[-1] - ended[at_once - 1])
            yield {
                "model": model,
                "at_once": at_once,
                "trials": trials,
                "seconds": seconds,
                "trials_an_hour": rate,
                "device_mb": megabytes(peak[0]),
            }


def decisions(rows):
    rates = collections.defaultdict(dict)
    for row in rows:
        rates[row["model"]][row["at_once"]] = row["trials_an_hour"]
    enough = {}
    for model, of_model in rates.items():
        best = max(of_model.values())
        enough[model] = min(number for number, rate in of_model.items() if rate >= 0.9 * best)
        gain = best / of_model[1]
        yield f"{model}: {enough[model]} at once give at least 0.9 of the most trials an hour, {gain:.1f} times those of one"
    if len(enough) == len(WORK):
        yield f"the default of --trials_per_device: {min(enough.values())}; docs/gpu.md gets the table"
    if 8 in rates["lenet"]:
        gain = rates["lenet"][8] / rates["lenet"][1]
        yield f"8 trials of lenet at once: {gain:.1f} times those of one, wanted 4: {'met' if gain >= 4 else 'not met'}"
