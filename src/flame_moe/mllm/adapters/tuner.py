"""What the two adapters share as PEFT models: which layers, whose base, and what is known of a forward's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flame_moe.errors import AdapterError
from flame_moe.mllm.adapters.record import RoutingRecord
from flame_moe.mllm.adapters.targets import check_base, fingerprint, language_model, resolve_targets
from flame_moe.mllm.adapters.tokens import Tokens
from flame_moe.mllm.adapters.variant import not_mergeable


class ExpertTuner(LoraModel):
    """A PEFT model whose linear layers hold experts.

    Attributes:
        tokens: what is known of the running forward's tokens; every layer of the model sees the same.
        layer_cls: the kind of adapted layer.
        config_cls: the configurations whose base is checked.
    """

    tokens: Tokens
    layer_cls: type[nn.Module]
    config_cls: type[LoraConfig]

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        self.tokens = Tokens()
        inside = language_model(model)
        self.tokens.attach(model, model.get_submodule(inside))

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        alone = getattr(peft_config, "language_only", True)
        try:
            peft_config.target_modules = resolve_targets(
                self.model, peft_config.target_modules, exclude=peft_config.exclude_modules, language_only=alone
            )
        except AdapterError as error:
            if getattr(peft_config, "base_fingerprint", None) is None:
                raise
            mend = "Load the base it was trained on."
            raise AdapterError(
                f"the adapter was made for another base model: {error.what}", where=error.where, mend=mend
            ) from None
        peft_config.exclude_modules = None
        if isinstance(peft_config, self.config_cls):
            config: Any = peft_config
            config.expected_base = config.base_fingerprint
            config.base_fingerprint = fingerprint(self.model, config.target_modules)
        return peft_config

    def _create_and_replace(  # type: ignore[override]  # as LoraModel's, which differs from its own base class
        self,
        lora_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        **rest: Any,
    ) -> None:
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **rest)
        layer: Any = getattr(parent, target_name)
        layer.tokens, layer.layer_name = self.tokens, current_key

    @classmethod
    def _new_layer(cls, config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        config.fan_in_fan_out = isinstance(target, Conv1D)
        return cls.layer_cls(
            target, adapter_name, config=config, is_target_conv_1d_layer=isinstance(target, Conv1D), **kwargs
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's own context around forward and generate: tells apart a prompt and what is generated after it."""
        given = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))]
        self.tokens.outer = next((value.shape[1] for value in given if isinstance(value, Tensor)), None)
        try:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
        finally:
            self.tokens.outer = None

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's hook before weights are put into a model: the last moment to see that they belong to another base."""
        if isinstance(config, cls.config_cls):
            checked: Any = config
            inner = model.base_model.model if isinstance(getattr(model, "base_model", None), cls) else model
            check_base(inner, checked.target_modules, checked.expected_base)
            checked.expected_base = None
        # not typed in PEFT
        return super()._remap_adapter_state_dict_for_load(  # type: ignore[no-untyped-call]
            model, config, adapter_name, state_dict
        )

    def layers(self) -> Iterator[tuple[str, Any]]:
        """Every adapted layer with its name in the model."""
        for name, module in self.model.named_modules():
            if isinstance(module, self.layer_cls):
                yield name, module

    def recording(self) -> AbstractContextManager[RoutingRecord]:
        """Keep what the routers do inside a `with` block.

        Example:
            >>> with model.recording() as record:  # doctest: +SKIP
            ...     model(**batch)
            >>> record.mass()  # doctest: +SKIP
            {'shapes': 0.71, 'digits': 0.29}
        """
        return self.tokens.recording()

    def prompted(self, mask: Tensor | None) -> AbstractContextManager[None]:
        """Say which tokens belong to the prompt, in a `with` block, for routing by whole prompts.

        Labels say it too, but the model then makes a loss of its own.

        Args:
            mask: (B, T) bool, of the forwards inside.

        Example:
            >>> with model.prompted(labels == -100):  # doctest: +SKIP
            ...     model(input_ids=ids, attention_mask=mask)
        """
        return self.tokens.prompted(mask)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT, refused before anything is merged where an adapter cannot be.

        Raises:
            AdapterError: if its experts are weighted anew for every token.
        """
        self._refuse_merge(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._refuse_merge(adapter_names)
        self.tokens.detach()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _refuse_merge(self, adapter_names: list[str] | None) -> None:
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if any(name in layer.lora_variant for _, layer in self.layers()):
                raise not_mergeable(name)
