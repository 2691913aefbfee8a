import pytest
import torch

from latentdiff.errors import UserError
from latentdiff.models.text_encoder import ClassCondition, drop


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_drop_happens_per_sample_at_its_rate():
    labels = torch.arange(20_000) % 10
    before = labels.clone()
    dropped = drop(labels, 10, 0.1, generator(0))
    rate = (dropped == 10).double().mean().item()
    assert abs(rate - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5
    assert torch.equal(labels, before)
    kept = dropped != 10
    assert torch.equal(dropped[kept], labels[kept])
    # neighbours are independent: pairs are dropped at the product of the rates, not all or none
    pairs = ((dropped[::2] == 10) & (dropped[1::2] == 10)).double().mean().item()
    assert abs(pairs - 0.01) < 4 * (0.01 * 0.99 / 10_000) ** 0.5


def test_drop_never_and_always():
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(drop(labels, 3, 0.0, generator(0)), labels)
    assert drop(labels, 3, 1.0, generator(0)).tolist() == [3, 3, 3]


def test_a_sample_is_dropped_or_not_whatever_its_neighbours():
    labels = torch.zeros(32, dtype=torch.long)
    together = drop(labels, 1, 0.5, [generator(i) for i in range(32)])
    alone = torch.cat([drop(labels[i : i + 1], 1, 0.5, [generator(i)]) for i in range(32)])
    assert torch.equal(together, alone)
    assert 0 < together.sum() < 32


def test_rows_of_the_embedding():
    condition = ClassCondition(5, dropout=0.1)
    assert (condition.null_class, condition.num_embeddings) == (5, 6)
    assert condition(torch.tensor([0, 5], dtype=torch.int32))["class_labels"].dtype == torch.long
    assert condition.unconditional(2)["class_labels"].tolist() == [5, 5]
    assert (condition.drop(torch.zeros(2000, dtype=torch.long), generator(1)) == 5).any()


def test_without_dropout_there_is_no_null_class():
    condition = ClassCondition(5, dropout=0.0)
    assert (condition.null_class, condition.num_embeddings) == (None, 5)
    labels = torch.arange(5)
    assert condition.drop(labels, generator(0)) is labels
    with pytest.raises(UserError, match="null class"):
        condition.unconditional(1)
    with pytest.raises(UserError, match="0 to 4"):
        condition(torch.tensor([5]))


@pytest.mark.parametrize("labels", [[-1, 0], [0, 6]])
def test_labels_out_of_range_are_refused(labels):
    with pytest.raises(UserError, match="0 to 5"):
        ClassCondition(5)(torch.tensor(labels))


@pytest.mark.parametrize("arguments", [(0, 0.1), (5, 1.0), (5, -0.1)])
def test_settings_that_make_no_sense_are_refused(arguments):
    with pytest.raises(UserError):
        ClassCondition(*arguments)
