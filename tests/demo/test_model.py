"""The model: one tensor under two names, no look into the future, and a loss that makes sense."""

from __future__ import annotations

import math

import torch

from stager.demo.model import GPT


def make_model(dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    return GPT(vocabulary_size=256, block_size=16, num_layers=2, num_heads=2, width=32, dropout=dropout)


def test_output_layer_is_the_token_embedding() -> None:
    model = make_model()
    assert model.lm_head.weight is model.tokens.weight
    state = model.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["tokens.weight"].data_ptr()
    assert sum(parameter is model.tokens.weight for parameter in model.parameters()) == 1


def test_untrained_loss_is_that_of_guessing_a_byte() -> None:
    text = torch.randint(256, (8, 17), generator=torch.Generator().manual_seed(1))
    loss = make_model()(text[:, :-1], text[:, 1:])
    assert abs(loss.item() - math.log(256)) < 0.1


def test_a_later_byte_does_not_change_an_earlier_prediction() -> None:
    model = make_model().eval()
    text = torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(1))
    changed = text.clone()
    changed[0, 10] += 1
    first, second = model.logits(text), model.logits(changed)
    assert torch.equal(first[:, :10], second[:, :10])
    assert not torch.equal(first[:, 10:], second[:, 10:])


def test_dropout_makes_the_loss_depend_on_the_random_state() -> None:
    model = make_model(dropout=0.5)
    text = torch.zeros(1, 16, dtype=torch.int64)
    assert model(text, text).item() != model(text, text).item()
