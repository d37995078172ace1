"""Small files of LEAF's form."""

import json

import numpy as np

from federated.data.leaf import CHARACTERS


def femnist_samples(rng, number):
    """LEAF's writing of images and classes: greys over 255 as decimals."""
    return (rng.integers(0, 256, (number, 784)) / 255).tolist(), rng.integers(0, 62, number).tolist()


def shakespeare_samples(rng, number):
    letters = ["".join(CHARACTERS[each] for each in row) for row in rng.integers(0, 80, (number, 81))]
    return [text[:80] for text in letters], [text[80] for text in letters]


SAMPLES = {"femnist": femnist_samples, "shakespeare": shakespeare_samples}


def write_leaf(data_dir, name, sizes, users_per_file=2):
    """Write users with `sizes` (training, test samples), and return {part: {user: {"x": …, "y": …}}}."""
    rng, written = np.random.default_rng(0), {}
    for part, place in (("train", 0), ("test", 1)):
        folder = data_dir / name / "data" / part
        folder.mkdir(parents=True)
        users = {f"u{user:05}": size[place] for user, size in reversed(list(enumerate(sizes))) if size[place]}
        written[part] = {}
        names = list(users)
        for first in range(0, len(names), users_per_file):
            some = names[first : first + users_per_file]
            data = {user: dict(zip("xy", SAMPLES[name](rng, users[user]))) for user in some}
            content = {"users": some, "num_samples": [users[user] for user in some], "user_data": data}
            (folder / f"all_data_{first}_{part}_9.json").write_text(json.dumps(content))
            written[part] |= data
    return written
