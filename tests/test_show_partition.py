"""The table and the picture of a partition, by the real command."""

import pytest


def show(call, *options):
    result = call("sweep.py", "show_partition", *options)
    assert result.returncode == 0, result.stderr
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines())
    return header, {name: list(map(int, numbers)) for name, *numbers in rows}


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "labels", "quantity"])
def test_the_table_adds_up(call, tmp_path, partition):
    header, rows = show(call, "--partition", partition, "--num_clients", 10)
    assert header == ["client", *map(str, range(10)), "train", "validation", "test"]
    assert list(rows) == [*map(str, range(10)), "all"]
    *clients, total = rows.values()
    assert total == [sum(column) for column in zip(*clients)]
    for *labels, train, validation, _ in rows.values():
        assert sum(labels) == train + validation
    assert total[-3] + total[-2] == 1437 and total[-1] == 360
    if partition == "labels":
        assert all(sum(count > 0 for count in row[:10]) == 2 and row[client % 10] for client, row in enumerate(clients))
    assert list(tmp_path.iterdir()) == []


def test_natural_owners(call):
    _, rows = show(call, "--dataset", "heart_disease")
    assert rows["0"] == [108, 91, 179, 20, 104] and rows["2"] == [0, 30, 27, 3, 16]
    assert rows["all"][-1] == 254


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_is_drawn_in_the_format_of_its_name(call, awkward, suffix, start):
    file = awkward / f"partition.{suffix}"
    show(call, "--num_clients", 20, "--partition", "dirichlet", "--picture", file)
    assert file.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--picture", "partition.jpg"), "'partition.jpg' is not a file's name that ends in .png, .svg, .pdf"),
        (("--picture", "none/partition.png"), "'none/partition.png' is not a file in a directory that is there"),
        (("--partition", "labels", "--labels_per_client", "11"), "more than the 10 labels"),
        (("--partition", "natural"), "the samples of digits have no owners"),
        (("--output_dir", "out"), "unrecognized arguments: --output_dir out"),
    ],
)
def test_bad_input_is_one_line(call, tmp_path, options, message):
    result = call("sweep.py", "show_partition", *options)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []
