"""What is asked of a pool of routed LoRA experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft import LoraConfig

from flame_moe.errors import AdapterError
from flame_moe.mllm.adapters.lora_fields import check_lora_fields, one_of, positive
from flame_moe.mllm.adapters.peft_types import peft_type
from flame_moe.mllm.adapters.scores import DISCRIMINANT, SCORES

ROUTED_LORA = "FLAME_ROUTED_LORA"
GRANULARITIES = ("token", "sequence", "model")


@dataclass
class RoutedLoraConfig(LoraConfig):
    """One LoRA expert per task, and routing among them (arXiv 2511.01831; gates of PHATGOOSE, arXiv 2402.05859).

    Goes to `peft.get_peft_model`. Every option of `LoraConfig` that describes one plain LoRA holds for every new
    expert; `target_modules` left out means every linear layer of the language model but its head.

    Args:
        r: rank of an expert, 16 in PHATGOOSE.
        lora_alpha: an expert's output is multiplied by `lora_alpha / r`.
        top_k: how many experts a token uses, at most as many as there are.
        score: "standardized", "cosine", "raw", "arrow" or "discriminant" (see `flame_moe.mllm.adapters.scores`); the
            last is of whole prompts and of vectors from `fit_gate`.
        granularity: "token": every token chooses for itself in every layer; "sequence": the mean score over the prompt
            chooses for the whole sample, layer by layer; "model": the mean of that over all layers chooses for the
            whole sample and model, for which a prompt runs twice (our own; wants top_k=1). With discriminant scores it
            runs without experts the first time, so that what is said of one expert does not depend on the others.
        temperature: by which scores are divided before the softmax.
        null_expert: whether a fitted null expert, whose output is zero, takes part (see `fit_null`).
        language_only: whether a target outside the language model is a mistake.
        tasks: the experts, in order of their arrival; written by the model.
        base_fingerprint: of the base model, written by the model and compared when an adapter is loaded.

    Raises:
        AdapterError: if an option makes no sense.

    Example:
        >>> RoutedLoraConfig(top_k=1, score="cosine", temperature=0.1).r
        16
        >>> RoutedLoraConfig(top_k=0)
        Traceback (most recent call last):
        flame_moe.errors.AdapterError: top_k is 0 [top_k]. Give a whole number from 1.
    """

    r: int = field(default=16, metadata={"help": "rank of an expert"})
    lora_alpha: int = field(default=16, metadata={"help": "an expert's output is multiplied by lora_alpha / r"})
    top_k: int = field(default=2, metadata={"help": "experts that a token uses"})
    score: Literal["standardized", "cosine", "raw", "arrow", "discriminant"] = field(default="standardized")
    granularity: Literal["token", "sequence", "model"] = field(default="token")
    temperature: float = field(default=1.0)
    null_expert: bool = field(default=False, metadata={"help": "whether a fitted null expert takes part"})
    language_only: bool = field(default=True, metadata={"help": "whether other targets are a mistake"})
    tasks: list[str] = field(default_factory=list)
    base_fingerprint: str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # not typed in PEFT
        self.peft_type = peft_type(ROUTED_LORA)
        self.source: tuple[str, dict[str, Any]] | None = None
        self.awaited: list[str] = []
        self.expected_base: str | None = None
        self.check()

    def check(self) -> None:
        """Raise AdapterError if an option makes no sense."""
        check_lora_fields(self)
        one_of("score", self.score, SCORES)
        one_of("granularity", self.granularity, GRANULARITIES)
        positive("temperature", self.temperature)
        if self.score == DISCRIMINANT and self.granularity == "token":
            mend = "Give granularity='model' or 'sequence'."
            raise AdapterError("discriminant scores are of whole prompts, not of tokens", where="score", mend=mend)
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 1:
            raise AdapterError(f"top_k is {self.top_k!r}", where="top_k", mend="Give a whole number from 1.")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> RoutedLoraConfig:
        """As in PEFT; remembers where it was read, since the experts lie beside it."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        hub = {name: kwargs[name] for name in ("revision", "cache_dir", "token") if kwargs.get(name) is not None}
        config.source = (str(pretrained_model_name_or_path), hub)
        return config

    def expert(self, **changes: Any) -> LoraConfig:
        """The plain `LoraConfig` of a new expert.

        Args:
            changes: options of `LoraConfig` that differ for this expert.
        """
        shared = {
            name: getattr(self, name)
            for name in (
                "r",
                "lora_alpha",
                "lora_dropout",
                "use_rslora",
                "init_lora_weights",
                "rank_pattern",
                "alpha_pattern",
                "fan_in_fan_out",
                "task_type",
                "target_modules",
                "base_model_name_or_path",
                "revision",
            )
        }
        config = LoraConfig(**shared | changes)
        check_lora_fields(config)
        return config
