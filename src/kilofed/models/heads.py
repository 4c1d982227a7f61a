"""A classification head: the normalized mean of the last hidden states and one linear layer.

Sentence encoders are trained to represent a text by this mean. After 40 steps on Banking77 its accuracy is 44 %, that of
the head of transformers 12 %; `benchmarks/models/classify.py --quick` prints both.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

SCALE = 10.0
"""Factor on the logits. Under Adam it multiplies the head's effective learning rate by ten, so that one rate suits head
and adapter; and logits of normalized vectors become large enough for confident predictions."""


class Classified(NamedTuple):
    """Output of a classifier."""

    logits: Tensor
    """(B, num_classes) float32."""


class MeanClassifier(nn.Module):
    """Any transformers model without its own head, and a linear layer in float32 on the mean of its hidden states.

    Args:
        encoder: encoder or decoder as AutoModel loads it; its unused pooling layer is removed.
    """

    def __init__(self, encoder: PreTrainedModel, num_classes: int) -> None:
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.register_module("pooler", None)
        self.encoder = encoder
        self.config = encoder.config
        self.score = nn.Linear(int(encoder.config.hidden_size), num_classes, dtype=torch.float32)
        nn.init.zeros_(
            self.score.weight
        )  # All classes start with equal probability, and all parties with equal weights.
        nn.init.zeros_(self.score.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Classified:
        """Logits of rows (B, T) whose padding is masked."""
        # In the type hints of transformers, modules are not callable.
        encoder: nn.Module = self.encoder
        h_BTD = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        mask_BT1 = attention_mask[:, :, None].to(h_BTD.dtype)
        mean_BD = (h_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
        return Classified(SCALE * self.score(nn.functional.normalize(mean_BD, dim=-1)))

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's token embeddings."""
        return self.encoder.get_input_embeddings()

    def save_pretrained(self, folder: str, *, safe_serialization: bool = True) -> None:
        """Write the encoder as a transformers model directory, and the head as head.safetensors in it."""
        assert safe_serialization
        self.encoder.save_pretrained(folder)
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in self.score.state_dict().items()}
        save_file(head, Path(folder) / "head.safetensors", {"scale": str(SCALE)})
