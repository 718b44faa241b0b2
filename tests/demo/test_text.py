"""The loader deals out the same text in the same order, and goes on in the middle of it."""

from __future__ import annotations

import io

import pytest
import torch

from stager.demo.text import TextBatches, read_corpus

TEXT = torch.arange(103, dtype=torch.uint8)  # byte i is i: a batch shows where it was cut
NUM_WINDOWS = 10  # of 10 bytes each, with a target for the last


def make_loader(seed: int = 0, batch_size: int = 3) -> TextBatches:
    return TextBatches(TEXT, batch_size, 10, seed)


def take(loader: TextBatches, number: int) -> torch.Tensor:
    return torch.stack([next(loader)[0] for _ in range(number)])


def test_corpus_is_english_text_of_a_useful_size() -> None:
    corpus = read_corpus()
    assert corpus.dtype == torch.uint8
    assert corpus.numel() > 200_000
    assert b'The "assert" statement' in corpus.numpy().tobytes()


def test_targets_are_the_inputs_moved_on_by_one_byte() -> None:
    inputs, targets = next(make_loader())
    assert inputs.shape == targets.shape == (3, 10)
    assert inputs.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)


def test_same_seed_gives_the_same_order_and_another_seed_another() -> None:
    first = take(make_loader(seed=1), 7)
    assert torch.equal(first, take(make_loader(seed=1), 7))
    assert not torch.equal(first, take(make_loader(seed=2), 7))


def test_an_epoch_visits_each_window_once_and_the_next_in_another_order() -> None:
    loader = make_loader(batch_size=5)
    epochs = [take(loader, loader.batches_per_epoch)[:, :, 0].flatten() for _ in range(2)]
    for starts in epochs:
        assert sorted(starts.tolist()) == [10 * window for window in range(NUM_WINDOWS)]
    assert not torch.equal(*epochs)


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 4, 7])  # three batches an epoch: starts, middles and ends of them
def test_state_taken_anywhere_resumes_with_the_next_batch(taken: int) -> None:
    loader = make_loader()
    for _ in range(taken):
        next(loader)
    stored = io.BytesIO()
    torch.save(loader.state_dict(), stored)
    expected = take(loader, 8)

    stored.seek(0)
    resumed = make_loader(seed=99)
    take(resumed, 5)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    assert torch.equal(take(resumed, 8), expected)


def test_state_is_a_copy_that_later_batches_do_not_change() -> None:
    loader = make_loader()
    state = loader.state_dict()
    kept = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    take(loader, 8)
    assert torch.equal(state["generator"], kept["generator"])
    assert (state["epoch"], state["position"]) == (kept["epoch"], kept["position"])


def test_text_shorter_than_a_batch_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="103 bytes has 10 windows of 10 bytes, fewer than one batch of 11"):
        make_loader(batch_size=11)
