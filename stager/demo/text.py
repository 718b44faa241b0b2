"""The corpus and the loader that deals it out in batches.

The corpus is the English text behind Python's ``help()`` (``pydoc_data.topics``, about 0.5 MB): it is on every
machine that has Python, so the demo downloads nothing.  Bytes are the vocabulary.
"""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import torch

VOCABULARY_SIZE = 256


def read_corpus() -> torch.Tensor:
    """The whole text as a 1-d uint8 tensor, topics in alphabetical order."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8)


class TextBatches:
    """An endless iterator over shuffled windows of a text, whose place in the data can be saved and restored.

    The text is cut into windows of ``block_size`` bytes; each epoch visits every window once, in an order drawn
    from the loader's own generator.  Its state is the generator's state at the start of the epoch and the number
    of batches taken since, so a resumed loader draws the same order again and goes on in the middle of it.

    Yields:
        ``(inputs, targets)``: two int64 tensors of shape ``(batch_size, block_size)``; targets are the inputs
        moved on by one byte.

    Raises:
        ValueError: the text is shorter than one batch.
    """

    def __init__(self, text: torch.Tensor, batch_size: int, block_size: int, seed: int) -> None:
        self._text = text
        self._batch_size = batch_size
        self._block_size = block_size
        self._num_windows = (text.numel() - 1) // block_size
        if self._num_windows < batch_size:
            raise ValueError(
                f"a text of {text.numel()} bytes has {self._num_windows} windows of {block_size} bytes, "
                f"fewer than one batch of {batch_size}"
            )
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch = 0
        self._begin_epoch()

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in one pass over the text; windows that do not fill a batch are left out of that pass."""
        return self._num_windows // self._batch_size

    def _begin_epoch(self) -> None:
        self._epoch_generator_state = self._generator.get_state()
        self._order = torch.randperm(self._num_windows, generator=self._generator)
        self._position = 0

    def __iter__(self) -> TextBatches:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._position == self.batches_per_epoch:
            self._epoch += 1
            self._begin_epoch()
        first = self._position * self._batch_size
        self._position += 1
        starts = self._order[first : first + self._batch_size].unsqueeze(1) * self._block_size
        indices = starts + torch.arange(self._block_size + 1)
        windows = self._text[indices].long()
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """The place in the data: epoch, batches taken in it, and the generator's state when it began."""
        return {
            "generator": self._epoch_generator_state.clone(),
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place that ``state_dict()`` described."""
        self._generator.set_state(state["generator"])
        self._begin_epoch()
        self._epoch = state["epoch"]
        self._position = state["position"]
