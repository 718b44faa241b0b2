"""A small GPT: the model the demo trains."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, num_heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(batch, time, width)`` in and out."""
        batch, time, width = hidden.shape
        heads = self.qkv(hidden).view(batch, time, 3, self.num_heads, width // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        merged: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return merged


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm and added to the residual stream."""

    def __init__(self, num_heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(num_heads, width, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``(batch, time, width)`` in and out."""
        hidden = hidden + self.dropout(self.attention(self.norm1(hidden)))
        widened: torch.Tensor = hidden + self.dropout(self.mlp(self.norm2(hidden)))
        return widened


class GPT(nn.Module):
    """A decoder-only transformer whose output layer is its token embedding.

    ``lm_head.weight`` and ``tokens.weight`` are one tensor under two names, so a checkpoint that lost aliasing
    would store it twice and train two different tensors after a resume.
    """

    def __init__(
        self,
        *,
        vocabulary_size: int,
        block_size: int,
        num_layers: int,
        num_heads: int,
        width: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary_size, width)
        self.positions = nn.Embedding(block_size, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(num_heads, width, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary_size, bias=False)
        self.apply(_initialise)
        self.lm_head.weight = self.tokens.weight

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy, in nats per byte, of ``targets`` given ``inputs`` (both int64, ``(batch, time)``)."""
        places = torch.arange(inputs.shape[1], device=inputs.device)
        hidden = self.dropout(self.tokens(inputs) + self.positions(places))
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.lm_head(self.norm(hidden))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _initialise(module: nn.Module) -> None:
    """GPT-2's: normal with standard deviation 0.02, biases zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
