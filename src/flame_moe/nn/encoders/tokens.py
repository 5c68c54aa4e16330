"""Texts read by a pre-trained transformer inside the model, trained in the stage in which they first appear."""

from __future__ import annotations

import math

from torch import Tensor

from flame_moe.batch import ModalityBatch
from flame_moe.foreign import build_model, model_width
from flame_moe.nn.dropout import dropout
from flame_moe.nn.encoders.base import Encoder
from flame_moe.nn.encoders.time_attention import TimeEmbedding
from flame_moe.nn.layers import StackedLinear
from flame_moe.nn.moe import Sequences
from flame_moe.nn.stacked import Settled
from flame_moe.schema import Modality, ModelConfig


class TokenEncoder(Encoder):
    """(n, L, C) pieces of texts at times (n, L) -> (n, L, d), one step per piece.

    A piece becomes the mean of the transformer's last layer over its tokens, through one linear map that can grow, with
    the time of its text added. The transformer trains in the stage in which the modality first appears and is frozen
    afterwards: what a later stage changes is the map, attention and experts behind it. It is built from its config with
    random weights; `flame_moe.continual.learner` puts the pre-trained ones in before it is first trained.
    """

    def __init__(self, modality: Modality, config: ModelConfig, stage: int) -> None:
        super().__init__(modality, config, stage)
        assert modality.pretrained is not None
        plain = modality.pretrained.config
        self.dropout, self.pad = config.dropout, int(plain.get("pad_token_id") or 0)
        self.reader = Settled(build_model(plain), stage)
        self.out = StackedLinear(model_width(plain), config.width, stage=stage)
        self.embed_time = TimeEmbedding(config.time_width, stage=stage)
        self.time_map = StackedLinear(config.time_width, config.width, stage=stage)

    def forward(self, part: ModalityBatch, cursor: int) -> Sequences:
        assert part.times is not None
        pieces = self.out(self._read(part.take(part.values).long()), cursor)
        time = self.time_map(self.embed_time(part.take(part.times), cursor), cursor) / math.sqrt(pieces.shape[-1])
        return Sequences(part.put(dropout(pieces + time, self.dropout, self.training)), part.mask)

    def _read(self, numbers: Tensor) -> Tensor:
        """(P, C) numbers of tokens plus 1, 0 beyond the end -> (P, W) means over the tokens."""
        numbers = numbers[:, : int((numbers > 0).sum(1).max())]
        seen = numbers > 0
        ids = (numbers - 1).masked_fill(~seen, self.pad)
        states = self.reader.module(input_ids=ids, attention_mask=seen.long()).last_hidden_state
        weight = seen[..., None].to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1)
