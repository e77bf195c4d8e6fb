"""An epoch of augmented batches."""

from functools import partial

import suites

CONTESTANTS = (suites.LOADER, "DataLoader, transforms.v2", "fastres")


def cases(quick):
    n = 256 if quick else 10_000
    return {f"{n}-images": partial(suites.data_race, n, 128)}


def test_epoch(contest):
    contest()
