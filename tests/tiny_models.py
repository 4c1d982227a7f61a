"""Tiny random models with pronounced opinions, for tests of proxies."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kilofed.config.recipe import AdapterSpec
from kilofed.models.loading import add_adapter

VOCABULARY = 40


def model(seed: int, *, width: int = 16, vocabulary: int = VOCABULARY, context: int = 64) -> PreTrainedModel:
    """A random Llama with pronounced opinions: two layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=context,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,  # Answers run to their full length.
            initializer_range=0.3,
        )
        return LlamaForCausalLM(config).eval()


def adapted(seed: int, base: PreTrainedModel | None = None) -> nn.Module:
    """A small model with a LoRA adapter that does something."""
    small = add_adapter(base or model(seed), AdapterSpec(rank=3, alpha=6.0), seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, parameter in small.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return small


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
