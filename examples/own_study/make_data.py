"""Makes keystrokes.npz: rows of eight times, each from one of six people, that say which of three words was typed."""

import pathlib

import numpy as np

PEOPLE, WORDS, SAMPLES = 6, 3, 300


def main() -> None:
    rng = np.random.default_rng(0)
    rhythm = rng.normal(size=(WORDS, 8, 4))
    labels, owners = rng.integers(WORDS, size=SAMPLES), np.arange(SAMPLES) % PEOPLE
    pace = rng.uniform(0.5, 1.5, PEOPLE)[owners, None, None]  # so that people differ
    inputs = (pace * rhythm[labels] + rng.normal(size=(SAMPLES, 8, 4))).astype(np.float32)
    is_test = rng.random(SAMPLES) < 0.25
    parts = {"train": ~is_test, "test": is_test}
    arrays = {"inputs": inputs, "labels": labels, "owners": owners}
    path = pathlib.Path(__file__).with_name("keystrokes.npz")
    np.savez_compressed(path, **{f"{part}_{what}": array[of] for part, of in parts.items() for what, array in arrays.items()})


if __name__ == "__main__":
    main()
