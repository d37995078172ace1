"""The part `headline`: resnet18, 2 clients x 10,000 samples, crop and flip, 50 rounds, 3 sets x 3 trials. One trial of each set
runs for a few rounds; the rest is arithmetic."""

import statistics

from common import launch, places

SETS, TRIALS, ROUNDS = 3, 3, 50
WANTED = 600  # seconds


def rows(device, tiny):
    samples, rounds = (20, 2) if tiny else (10_000, 3)
    options = ["--model_arch", "lenet" if tiny else "resnet18", "--augmentation", "crop_flip", "--samples_per_client", samples]
    options += ["--num_trials", 1, "--rounds", rounds, "--jobs", 1]
    with places(2 * samples, 20 if tiny else 10_000) as (data_dir, output_dir):
        for precision, sets in (("fp32", SETS), ("bf16", 1)):
            if device == "cpu" and precision == "bf16":
                continue  # many CPUs have no bf16
            chosen = ["--num_hparams", sets, "--precision", precision]
            wall, results = launch(data_dir, output_dir / precision, device, *chosen, *options)
            within = 0.0
            for content in results.values():
                seconds = content["provenance"]["seconds"]
                of_trial = sum(seconds[stage] for stage in ("start", "join", "rounds"))
                within += of_trial
                yield {
                    "precision": precision,
                    "batch_size": content["hparams"]["batch_size"],
                    "s_a_round": statistics.median(content["curves"]["round_seconds"][1:]),  # the first one captures
                    "s_start": seconds["start"] + seconds["join"],
                    "s_trial": of_trial,
                }
            yield {"precision": precision, "s_launch_itself": wall - within}


def decisions(rows):
    for precision in dict.fromkeys(row["precision"] for row in rows):
        trials = [row for row in rows if row["precision"] == precision and "s_a_round" in row]
        itself = [row["s_launch_itself"] for row in rows if row["precision"] == precision and "s_launch_itself" in row]
        if len(trials) < SETS or not itself:
            continue
        starts, rounds = sum(row["s_start"] for row in trials), sum(row["s_a_round"] for row in trials)
        total = itself[0] + TRIALS * (starts + ROUNDS * rounds)
        verdict = "met" if total <= WANTED else "not met, before several at once"
        minutes = f"{total / 60:.1f} minutes one after another, wanted {WANTED // 60}: {verdict}"
        per_set = f"{starts:.1f} s of starts + {ROUNDS} rounds x {rounds:.2f} s, of {SETS} sets"
        yield f"{precision}: {itself[0]:.1f} s + {TRIALS} trials x ({per_set}) = {minutes}"
    defaults = {row["precision"]: row["s_a_round"] for row in rows if row.get("batch_size") == 64}
    if len(defaults) == 2:
        yield f"bf16 takes {defaults['bf16'] / defaults['fp32']:.2f} of fp32's time a round: docs/gpu.md advises it below 0.8"
