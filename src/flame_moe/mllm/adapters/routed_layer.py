"""One linear layer with a LoRA expert per task, a routing vector for each, and the choice among them.

n input features, E experts of this layer, k chosen ones:

    expert i        y = W u + c_i B_i A_i u                                    c_i = alpha / r
    gate of i       y = W u + sigmoid(v_i^T u) c_i B_i A_i u                   only v_i is trained
    routed          y = W u + sum_i w_i(u) c_i B_i A_i u                       w: `scores.top_k_weights`

The experts are LoRA adapters of PEFT; the gate and the routed sum are LoRA variants of PEFT (`LoraVariant`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from flame_moe.errors import AdapterError
from flame_moe.mllm.adapters.routed_config import RoutedLoraConfig
from flame_moe.mllm.adapters.scores import DISCRIMINANT, gate, pooled, scores, top_k_weights
from flame_moe.mllm.adapters.tokens import Tokens
from flame_moe.mllm.adapters.variant import TokenDependent

NULL = "(null)"
"""Name of the null expert in a record; no task can be called so."""


class RoutedLinear(lora.Linear):
    """A linear layer with routed LoRA experts; what a forward does depends on the active adapter alone.

    Attributes:
        lora_gate: task -> routing vector (n,), float32, zero until it is trained, filled or fitted.
        lora_offset: task -> what is added to its discriminant score, (), float32, zero until it is fitted.
        lora_null: name of the router -> its null expert.
        tokens: what is known of the tokens of the running forward, shared by all layers of a model.
        layer_name: of this layer in the model.
    """

    adapter_layer_names: tuple[str, ...] = (*lora.Linear.adapter_layer_names, "lora_gate", "lora_offset")
    tokens: Tokens
    layer_name: str

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an expert, or the router."""
        if not hasattr(self, "lora_gate"):
            self.lora_gate = nn.ParameterDict()
            self.lora_offset = nn.ParameterDict()
            self.lora_null = nn.ModuleDict()
            self.frozen_peft_weight_names = {}
        base: Any = self.get_base_layer()
        weight, features = base.weight, cast(int, self.in_features)
        if isinstance(config, RoutedLoraConfig):
            self.lora_variant[adapter_name] = Routed(config)
            self.lora_A[adapter_name] = self.lora_B[adapter_name] = _NoWeights(weight.dtype)
            self.lora_dropout[adapter_name] = nn.Identity()
            self.scaling[adapter_name], self.lora_bias[adapter_name] = 1.0, False
            self.lora_null[adapter_name] = NullExpert(features, weight.device)
            return
        for kept, shape in ((self.lora_gate, (features,)), (self.lora_offset, ())):
            zeros = torch.zeros(shape, dtype=torch.float32, device=weight.device)
            kept[adapter_name] = nn.Parameter(zeros, requires_grad=False)
        self.frozen_peft_weight_names[adapter_name] = ("lora_gate", "lora_offset")
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def gate_only(self, task: str | None) -> None:
        """Apply and train the gate of this expert and nothing else; None: of none."""
        for name in list(self.lora_gate):
            chosen = name == task
            still = ("lora_A", "lora_B") if chosen else ("lora_gate",)
            self.frozen_peft_weight_names[name] = (*still, "lora_offset")
            if chosen:
                self.lora_variant[name] = Gated()
            else:
                self.lora_variant.pop(name, None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an expert and its gate."""
        super().delete_adapter(adapter_name)
        if adapter_name in self.lora_null:
            del self.lora_null[adapter_name]

    @property
    def routes(self) -> bool:
        """Whether the router is what is active here, and adapters are not disabled."""
        active = (self.lora_variant.get(name) for name in self.active_adapters)
        return not self.disable_adapters and any(isinstance(variant, Routed) for variant in active)

    def expert_output(self, task: str, x: Tensor) -> Tensor:
        """c B A u of one expert: (..., n) -> (..., out)."""
        down: Any = self.lora_A[task]
        up = self.lora_B[task]
        return up(down(self.lora_dropout[task](x.to(down.weight.dtype)))) * self.scaling[task]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As in PEFT, but a gate and its offset stay in float32."""
        whole = [(kept, kept.get(adapter_name)) for kept in (self.lora_gate, self.lora_offset)]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for kept, before in whole:
            if before is not None and before.device.type != "meta":
                place = kept[adapter_name].device
                kept[adapter_name] = nn.Parameter(before.detach().to(place), requires_grad=before.requires_grad)


class Gated(TokenDependent):
    """An expert behind its own sigmoid gate, as it is while the gate is trained."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Base output plus the gated expert: x (..., n), result (..., out) -> (..., out)."""
        output = module.expert_output(active_adapter, x)
        return result + gate(x, module.lora_gate[active_adapter]).to(output.dtype) * output


class Routed(TokenDependent):
    """The sum of the experts that each token, or each sample, chooses."""

    def __init__(self, config: RoutedLoraConfig) -> None:
        self.config = config

    def forward(  # type: ignore[override]  # PEFT's is static and calls it on the instance
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Base output plus the weighted experts: x (..., n), result (..., out) -> (..., out)."""
        pool = [task for task in self.config.tasks if task in module.lora_gate]
        if not pool:
            return result
        names = [*pool, NULL] if self.config.null_expert else pool
        if self.config.score == DISCRIMINANT and module.tokens.scouted is not None:
            _vote(module, names, self.score(module, active_adapter, names, x), x)
            return result
        weights = self.weights(module, active_adapter, names, x)
        if (record := module.tokens.record) is not None and module.tokens.scouted is None:
            record.add(module.layer_name, names, weights.expand(*x.shape[:-1], len(names)), module.tokens.real_of(x))
        for i, task in enumerate(pool):
            output = module.expert_output(task, x)
            result = result + weights[..., i, None].to(output.dtype) * output
        return result

    def weights(self, module: RoutedLinear, router: str, names: Sequence[str], x: Tensor) -> Tensor:
        """Weight of every expert, by name: (..., n) -> (..., E), or (B, 1, E) where a whole sample chooses."""
        config, score = self.config, self.score(module, router, names, x)
        if config.granularity == "sequence":
            score = _decided(module, score, x)
        elif config.granularity == "model" and module.tokens.scouted is not None:
            _vote(module, names, score, x)
        elif config.granularity == "model":
            score = _agreed(module, names, score)
        return top_k_weights(score, config.top_k, config.temperature)

    def score(self, module: RoutedLinear, router: str, names: Sequence[str], x: Tensor) -> Tensor:
        """Score of every expert for every token: (..., n) -> (..., E)."""
        kind, pool = self.config.score, [name for name in names if name != NULL]
        found = scores(x, torch.stack([module.lora_gate[name] for name in pool]), kind)
        if kind == DISCRIMINANT:
            found = found + torch.stack([module.lora_offset[name] for name in pool])
        if names[-1] != NULL:
            return found
        # The ratio of a density to itself: to a discriminant, the null expert is the background.
        none = found.new_zeros(*found.shape[:-1], 1)
        null = none if kind == DISCRIMINANT else module.lora_null[router](x, kind)
        return torch.cat([found, null], dim=-1)


class NullExpert(nn.Module):
    """The score of using no expert: that of a routing vector of its own, plus an offset. Both are fitted, not trained.

    Args:
        features: n.
        device: where the layer's base is.
    """

    vector: Tensor
    offset: Tensor
    fitted: Tensor

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("vector", torch.zeros(features, device=device))
        self.register_buffer("offset", torch.zeros((), device=device))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool, device=device))

    def forward(self, x: Tensor, kind: str) -> Tensor:
        """(..., n) -> (..., 1)."""
        return scores(x, self.vector[None], kind) + self.offset


class _NoWeights(nn.Module):
    """Stands where PEFT looks for an adapter's matrices: the router has none, so nothing is stored or counted."""

    weight: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(0, dtype=dtype), persistent=False)


def _decided(module: RoutedLinear, score: Tensor, x: Tensor) -> Tensor:
    """The score of each sample, from the prompt; what the first forward with a cache decided stays so."""
    kept = module.tokens.decided.get(module.layer_name)
    if kept is None:
        kept = _of_samples(module, score, x)
        module.tokens.decided[module.layer_name] = kept
    if kept.shape[0] != score.shape[0] or kept.shape[-1] != score.shape[-1]:
        raise _changed(module)
    return kept


def _vote(module: RoutedLinear, names: Sequence[str], score: Tensor, x: Tensor) -> None:
    """Say how this layer scores each sample, for `_agreed`."""
    assert module.tokens.scouted is not None
    for name, column in zip(names, _of_samples(module, score, x)[:, 0].unbind(dim=-1), strict=True):
        module.tokens.scouted.setdefault(name, []).append(column)


def _agreed(module: RoutedLinear, names: Sequence[str], score: Tensor) -> Tensor:
    """The mean of all layers' votes on each sample, (B, 1, E)."""
    votes = [module.tokens.decided.get(name) for name in names]
    found = [vote for vote in votes if vote is not None and vote.shape[0] == score.shape[0]]
    if len(found) != len(names):
        raise _changed(module)
    return torch.stack(found, dim=-1)[:, None]


def _of_samples(module: RoutedLinear, score: Tensor, x: Tensor) -> Tensor:
    if score.ndim != 3:
        mend = "Use granularity='token' for layers whose input is not (batch, token, features)."
        raise AdapterError("a layer does not see whole sequences", where=module.layer_name, mend=mend)
    return pooled(score.detach(), module.tokens.prompt_of(x))


def _changed(module: RoutedLinear) -> AdapterError:
    mend = "Call the whole model with a new cache: samples or experts have changed since this one was filled."
    return AdapterError("the routing kept with the cache does not fit", where=module.layer_name, mend=mend)
