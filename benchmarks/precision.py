"""bf16 against fp32: seconds of training and evaluation, and the final test accuracy over five trials each.

python benchmarks/precision.py --data_dir DIR           cnn on Fashion-MNIST, 2 clients x 3,000 samples, 3 rounds
"""

import argparse
import statistics
import sys

from scaling import header, row, trials


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data")
    args = parser.parse_args(argv)
    work = ("--dataset", "fashion_mnist", "--model_arch", "cnn", "--samples_per_client", 3000, "--rounds", 3, "--num_trials", 5)
    header("precision", "training s", "evaluation s", "final test accuracy")
    for precision in ("fp32", "bf16"):
        _, results = trials(*work, "--precision", precision, "--data_dir", args.data_dir)
        seconds = [result["provenance"]["seconds"] for result in results]
        training, evaluation = (sum(each[stage] for each in seconds) for stage in ("training", "evaluation"))
        accuracies = [result["curves"]["test_acc"][-1] for result in results]
        mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
        row(precision, f"{training:.1f}", f"{evaluation:.1f}", f"{mean:.4f} ± {deviation:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
