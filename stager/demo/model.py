"""A small GPT: the model the demo trains."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class GPT(nn.Module):
    """A decoder-only transformer whose output layer is its token embedding.

    ``lm_head.weight`` and ``tokens.weight`` are one tensor under two names, so a checkpoint that lost aliasing
    would store it twice and train two different tensors after a resume.
    """

    def __init__(
        self, *, vocabulary_size: int, block_size: int, num_layers: int, num_heads: int, width: int, dropout: float
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Embedding(block_size, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, num_heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary_size, bias=False)
        self.apply(_initialise)
        self.lm_head.weight = self.tokens.weight

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy, in nats per byte, of ``targets`` given ``inputs`` (int64, ``(batch, time)``)."""
        return F.cross_entropy(self.logits(inputs).flatten(0, 1), targets.flatten())

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Predict the byte after each byte of ``inputs``: ``(batch, time, vocabulary_size)``."""
        time = inputs.shape[1]
        hidden = self.dropout(self.tokens(inputs) + self.positions(torch.arange(time, device=inputs.device)))
        mask = nn.Transformer.generate_square_subsequent_mask(time, device=inputs.device)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        predicted: torch.Tensor = self.lm_head(self.norm(hidden))
        return predicted


def _initialise(module: nn.Module) -> None:
    """Initialise as GPT-2: normal with standard deviation 0.02, biases zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
