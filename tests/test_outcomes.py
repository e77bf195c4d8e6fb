"""What follows from a model's answers, by hand."""

import math

import pytest
import torch

from fastres.train.outcomes import Outcomes

# Labels and likeliest classes of seven images, in two batches.
ANSWERS = (((0, 0), (0, 1), (0, 1), (1, 1)), ((1, 0), (0, 2), (2, 2)))


@pytest.fixture
def outcomes() -> Outcomes:
    made = Outcomes(("ant", "bee", "cat", "dog"))
    certainty = iter(range(1, 8))
    for batch in ANSWERS:
        labels = torch.tensor([label for label, _ in batch])
        logits = torch.stack([torch.eye(4)[predicted] * next(certainty) for _, predicted in batch])
        made.add(logits, labels)
    return made


def test_confusion_has_labels_in_rows(outcomes: Outcomes) -> None:
    assert outcomes.confusion().tolist() == [
        [1, 2, 1, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 0],
    ]


def test_a_line_a_class(outcomes: Outcomes) -> None:
    ant, bee, cat, dog = outcomes.per_class()
    assert (ant.name, ant.images, ant.correct, ant.mistaken_for) == ("ant", 4, 1, "bee")
    assert (bee.accuracy, bee.mistaken_for) == (0.5, "ant")
    assert (cat.accuracy, cat.mistaken_for) == (1.0, None)
    assert dog.images == 0
    assert dog.accuracy != dog.accuracy  # NaN


def test_the_wrongest_come_first_and_the_right_never(outcomes: Outcomes) -> None:
    assert outcomes.wrongest(10) == [5, 4, 2, 1]
    assert outcomes.wrongest(2) == [5, 4]
    # The logits are 6 and three zeros.
    assert float(outcomes.losses[5]) == pytest.approx(math.log(math.exp(6) + 3))
    assert float(outcomes.shares[5]) == pytest.approx(math.exp(6) / (math.exp(6) + 3))


def test_half_precision_and_no_image() -> None:
    made = Outcomes(("a", "b"))
    assert made.confusion().tolist() == [[0, 0], [0, 0]]
    assert made.wrongest(3) == []
    made.add(torch.tensor([[2.0, 1.0]], dtype=torch.bfloat16), torch.tensor([1]))
    assert made.predicted.tolist() == [0]
    assert made.labels.dtype == torch.int64
