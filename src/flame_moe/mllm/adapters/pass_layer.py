"""One linear layer with a mixture of LoRA experts of constant size (arXiv 2601.13020, PASs-RW).

n input features, E experts of rank r, z_e = A_e h the coordinates of h in expert e's pathway:

    s_e(h)  = ||A_e h||^2 / r                       energy of the pathway (router "pas"), or a learned linear router
    pi(h)   = softmax(s(h) / tau)
    y       = W h + c sum_e pi_e(h) B_e A_e h        c = alpha / r

The A of all experts are stacked into the `lora_A` (E r, n) of a LoRA adapter of PEFT, the B into `lora_B` (out, E r).
"""

from __future__ import annotations

import math
from typing import Any, cast

from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from flame_moe.mllm.adapters.pass_config import PassMoeConfig
from flame_moe.mllm.adapters.pass_memory import PathwayMemory
from flame_moe.mllm.adapters.scores import top_k_weights
from flame_moe.mllm.adapters.tokens import Tokens
from flame_moe.mllm.adapters.variant import TokenDependent


class PassLinear(lora.Linear):
    """A linear layer with a mixture of LoRA experts.

    Attributes:
        lora_router: name of the adapter -> its learned router, where it has one.
        lora_memory: name of the adapter -> what is remembered of earlier tasks.
        tokens: what is known of the tokens of the running forward, shared by all layers of a model.
        layer_name: of this layer in the model.
    """

    adapter_layer_names: tuple[str, ...] = (*lora.Linear.adapter_layer_names, "lora_router")
    tokens: Tokens
    layer_name: str

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add a mixture; `r` and `lora_alpha` are those of one expert."""
        assert isinstance(config, PassMoeConfig)
        if not hasattr(self, "lora_router"):
            self.lora_router = nn.ModuleDict()
            self.lora_memory = nn.ModuleDict()
        base: Any = self.get_base_layer()
        features, outputs = cast(int, self.in_features), cast(int, self.out_features)
        if config.router != "pas":
            self.lora_router[adapter_name] = nn.Linear(features, config.experts, bias=False)
        super().update_layer(adapter_name, r * config.experts, lora_alpha, config, **kwargs)
        if config.init_std is not None:
            nn.init.normal_(cast(Tensor, self.lora_A[adapter_name].weight), std=config.init_std)
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.lora_variant[adapter_name] = Mixture(config, r)
        self.lora_memory[adapter_name] = PathwayMemory(config, r, features, outputs, base.weight.device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove a mixture with its memory."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.lora_memory:
            del self.lora_memory[adapter_name]


class Mixture(TokenDependent):
    """The weighted sum of all experts, and the statistics of it."""

    def __init__(self, config: PassMoeConfig, r: int) -> None:
        self.config, self.r = config, r
        self.progress: float | None = None

    def forward(  # type: ignore[override]  # PEFT's is static and calls it on the instance
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Base output plus the mixture: x (..., n), result (..., out) -> (..., out)."""
        parts: tuple[Any, ...] = (module.lora_A, module.lora_B, module.lora_dropout)
        down, up, dropout = (part[active_adapter] for part in parts)
        z = self._split(down(x))
        pi = self.weights(module, active_adapter, x, z)
        dropped = z if isinstance(dropout, nn.Identity) or not module.training else self._split(down(dropout(x)))
        self._count(module, active_adapter, x, pi, dropped if self.config.importance == "product" else z)
        mixed = (pi[..., None].to(dropped.dtype) * dropped).flatten(-2)
        return result + up(mixed) * module.scaling[active_adapter]

    def weights(self, module: Any, adapter: str, x: Tensor, z: Tensor) -> Tensor:
        """pi: x (..., n) and z (..., E, r) -> (..., E), in float32."""
        if self.config.router == "pas":
            score = z.float().square().mean(dim=-1)
        else:
            score = module.lora_router[adapter](x).float()
        k = self.config.top_k if self.config.router == "topk" else self.config.experts
        return top_k_weights(score, k, self.temperature(module.training))

    def temperature(self, training: bool) -> float:
        """tau: in training it falls by a cosine over the task, in evaluation it is the last one."""
        start, end = self.config.temperature_start, self.config.temperature
        if not training or start is None:
            return end
        return end + (start - end) * (1 + math.cos(math.pi * (self.progress or 0.0))) / 2

    def _split(self, z: Tensor) -> Tensor:
        return z.unflatten(-1, (self.config.experts, self.r))

    def _count(self, module: Any, adapter: str, x: Tensor, pi: Tensor, z: Tensor) -> None:
        """Statistics, only while a forward of the model runs: not when a checkpoint computes a layer again."""
        if not module.tokens.running:
            return
        real = module.tokens.real_of(x)
        if module.tokens.record is not None:
            names = [str(e) for e in range(self.config.experts)]
            module.tokens.record.add(module.layer_name, names, pi, real)
        if module.training:
            module.lora_memory[adapter].see(pi, z, real if self.config.mask_padding else None)
