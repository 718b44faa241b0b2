"""Small models of transformers with random weights, and what a rank of a job does with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stager import Checkpointer, load_checkpoint
from tests.ranks.bodies import CONFIG

_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 70,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

NAMES = ("gpt2", "llama", "llama tied", "mixtral", "t5")


def config_of(name: str) -> Any:
    """The configuration of a model."""
    import transformers

    if name == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 70}
        return transformers.GPT2Config(architectures=["GPT2LMHeadModel"], **sizes, **_TOKENS)
    if name == "mixtral":
        sizes = {**_SIZES, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
        return transformers.MixtralConfig(architectures=["MixtralForCausalLM"], **sizes, **_TOKENS)
    if name == "t5":
        sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2, "vocab_size": 70}
        return transformers.T5Config(architectures=["T5ForConditionalGeneration"], **sizes)
    tied = {"tie_word_embeddings": name == "llama tied"}
    return transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], num_key_value_heads=1, **_SIZES, **_TOKENS, **tied
    )


def build(name: str, seed: int = 0) -> Any:
    """A model, with the same weights for the same seed."""
    import transformers

    config = config_of(name)
    torch.manual_seed(seed)
    model = getattr(transformers, config.architectures[0])(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are all alike otherwise
            parameter.copy_(torch.randn(parameter.shape))
    return model


def sharded(name: str, seed: int = 0) -> Any:
    """The model, under FSDP2: each block by itself, and the rest."""
    model = build(name, seed)
    for module in list(model.modules()):
        if type(module).__name__ in ("GPT2Block", "LlamaDecoderLayer", "MixtralDecoderLayer", "T5Block"):
            fully_shard(module)
    fully_shard(model)
    return model


def save(rank: int, directory: str, name: str) -> None:
    """Save the model, as a training job does."""
    with Checkpointer(Path(directory, "run"), CONFIG) as ckpt:
        ckpt.save(1, {"model": sharded(name), "step": 1}).upload_completion.result(60)


def load(rank: int, directory: str, name: str) -> list[str]:
    """Load what ``save_pretrained`` wrote into another model. Returns the names of what is not as it was saved."""
    model = sharded(name, seed=1)
    loaded = load_checkpoint(Path(directory, "pretrained"), into=model)
    expected = build(name).state_dict()
    found = {
        key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in model.state_dict().items()
    }
    assert found.keys() == expected.keys()
    return [*loaded.missing, *(key for key, value in expected.items() if not torch.equal(found[key], value))]
