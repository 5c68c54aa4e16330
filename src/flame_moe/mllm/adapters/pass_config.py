"""What is asked of a mixture of LoRA experts of constant size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import LoraConfig

from flame_moe.errors import AdapterError
from flame_moe.mllm.adapters.lora_fields import check_lora_fields, one_of, positive
from flame_moe.mllm.adapters.peft_types import peft_type

PASS_MOE = "FLAME_PASS_MOE"
ROUTERS = ("pas", "softmax", "topk")
IMPORTANCES = ("expectation", "product", "random", "even")
ANCHORS = ("previous", "running")

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "reference_code": {
        "r": 128,
        "lora_alpha": 256,
        "lora_dropout": 0.05,
        "init_std": 0.01,
        "temperature": 0.7,
        "temperature_start": 1.6,
        "importance": "product",
        "anchor": "running",
        "weight_cap": 10.0,
        "top_share": 0.3,
        "lambda_b": 50.0,
        "ramp": 0.3,
        "orthogonality": 1.0,
        "mask_padding": False,
    },
}
"""What differs from the defaults: nothing, and what the authors' released code does (docs/mllm.md lists it)."""


@dataclass
class PassMoeConfig(LoraConfig):
    """A fixed number of complete LoRA experts per layer that all stay trainable (PASs-MoE, arXiv 2601.13020).

    Goes to `peft.get_peft_model`. `r`, `lora_alpha`, `lora_dropout` and the initialisation are those of one expert;
    `target_modules` left out means every linear layer of the language model but its head.

    Args:
        experts: E.
        router: "pas": weights from the energy of each expert's own low-rank activations, no router parameters;
            "softmax": a learned linear router (MoE-LoRA); "topk": that, cut to the best `top_k`.
        top_k: of the router "topk".
        temperature: of the softmax; what evaluation always uses.
        temperature_start: in training the temperature falls from here to `temperature` by a cosine in each task.
        importance: "expectation": mean over tokens of pi_e (a_ek^T h)^2; "product": mean pi_e times mean
            (a_ek^T h)^2 per step, exponential mean over steps; two controls: "random", the expectation, permuted among
            ranks, and "even", the same for every rank.
        importance_decay: of the exponential mean.
        anchor: "previous": matrices as the last task left them; "running": their importance-weighted running mean.
        lambda_a: weight of the stabilisation of A; over the number of ranks in the model. Choose it on validation.
        lambda_b: the same of B.
        weight_cap: no rank weighs more, where 1 is the mean of a layer.
        top_share: only this share of a layer's ranks, the most important ones, is stabilised.
        ramp: share of a task over which stabilisation rises from 0; 0: none.
        orthogonality: factor of the extra term of the released code (see docs/mllm.md); 0: none.
        init_std: standard deviation of A at the start; None: PEFT's initialisation.
        mask_padding: whether padding counts in no statistic.
        language_only: whether a target outside the language model is a mistake.
        seed: of the control "random".
        base_fingerprint: of the base model, written by the model and compared when an adapter is loaded.

    Raises:
        AdapterError: if an option makes no sense.

    Example:
        >>> PassMoeConfig(experts=4, r=4).router
        'pas'
        >>> PassMoeConfig.from_preset("reference_code", experts=6, r=8).temperature_start
        1.6
    """

    experts: int = field(default=6)
    router: Literal["pas", "softmax", "topk"] = field(default="pas")
    top_k: int = field(default=2)
    temperature: float = field(default=1.0)
    temperature_start: float | None = field(default=None)
    importance: Literal["expectation", "product", "random", "even"] = field(default="expectation")
    importance_decay: float = field(default=0.9)
    anchor: Literal["previous", "running"] = field(default="previous")
    lambda_a: float = field(default=1000.0)
    lambda_b: float = field(default=500.0)
    weight_cap: float | None = field(default=None)
    top_share: float = field(default=1.0)
    ramp: float = field(default=0.0)
    orthogonality: float = field(default=0.0)
    init_std: float | None = field(default=None)
    mask_padding: bool = field(default=True)
    language_only: bool = field(default=True)
    seed: int = field(default=0)
    base_fingerprint: str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # not typed in PEFT
        self.peft_type = peft_type(PASS_MOE)
        self.expected_base: str | None = None
        check_lora_fields(self)
        if self.init_lora_weights not in (True, False):
            mend = "Leave it at True; init_std starts A from a normal distribution."
            what = f"init_lora_weights={self.init_lora_weights!r} would take all experts for one"
            raise AdapterError(what, where="init_lora_weights", mend=mend)
        one_of("router", self.router, ROUTERS)
        one_of("importance", self.importance, IMPORTANCES)
        one_of("anchor", self.anchor, ANCHORS)
        for name in ("temperature", "top_share", "experts", "top_k"):
            positive(name, getattr(self, name))
        for name in ("lambda_a", "lambda_b", "ramp", "orthogonality", "importance_decay"):
            positive(name, getattr(self, name), zero=True)
        for name in ("temperature_start", "weight_cap", "init_std"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name))
        for name in ("top_share", "ramp", "importance_decay"):
            if getattr(self, name) > 1:
                raise AdapterError(f"{name} is {getattr(self, name)!r}", where=name, mend="Give a share of at most 1.")
        if self.router == "topk" and self.top_k > self.experts:
            what = f"top_k is {self.top_k}, but there are {self.experts} experts"
            raise AdapterError(what, where="top_k", mend=f"Give at most {self.experts}.")

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> PassMoeConfig:
        """The configuration of a preset, "paper" or "reference_code", with your options.

        Where `lambda_a` alone is given to "reference_code", `lambda_b` follows at 0.05 of it, as in the code.

        Raises:
            AdapterError: if there is no such preset.
        """
        one_of("preset", name, PRESETS)
        preset = PRESETS[name] | options
        if name == "reference_code" and "lambda_b" not in options and "lambda_a" in options:
            preset["lambda_b"] = 0.05 * options["lambda_a"]
        return cls(**preset)
