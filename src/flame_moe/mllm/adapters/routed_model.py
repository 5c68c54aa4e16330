"""A pool of LoRA experts in a language model: add one per task, train it, train its gate, route."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import Tensor, nn

from flame_moe.errors import AdapterError, nearest
from flame_moe.mllm.adapters import expert_files, gates
from flame_moe.mllm.adapters.lora_fields import check_lora_fields
from flame_moe.mllm.adapters.routed_config import RoutedLoraConfig
from flame_moe.mllm.adapters.routed_layer import RoutedLinear
from flame_moe.mllm.adapters.scores import DISCRIMINANT
from flame_moe.mllm.adapters.targets import matched
from flame_moe.mllm.adapters.tuner import ExpertTuner

_OPTIONS = ("top_k", "score", "granularity", "temperature", "null_expert")


class RoutedLoraModel(ExpertTuner):
    """The PEFT model of `RoutedLoraConfig`; what it offers is reached through the `PeftModel` around it.

    Every expert is a LoRA adapter of PEFT with the name of its task, so `set_adapter`, `disable_adapter`,
    `merge_adapter`, `delete_adapter`, `adapter_names=[...]` and `save_pretrained` treat it as such. The adapter that
    `get_peft_model` made is the router: active, it routes.

    Example:
        >>> model = get_peft_model(base, RoutedLoraConfig())  # doctest: +SKIP
        >>> model.add_expert("charts"); model.train_expert("charts")  # doctest: +SKIP
        >>> ...  # your loop on the charts  # doctest: +SKIP
        >>> model.train_gate("charts")  # doctest: +SKIP
        >>> ...  # your loop on the charts, about a hundred steps  # doctest: +SKIP
        >>> model.route(); model.generate(**inputs)  # doctest: +SKIP
    """

    layer_cls = RoutedLinear
    config_cls = RoutedLoraConfig

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._pre_injection_hook(model, config, adapter_name)
        self.tokens.scout = partial(_needs_scouting, config, model)

    @property
    def router(self) -> str:
        """Name of the adapter that routes."""
        return next(name for name, config in self.peft_config.items() if isinstance(config, RoutedLoraConfig))

    @property
    def options(self) -> RoutedLoraConfig:
        """How it routes, and its tasks."""
        return cast(RoutedLoraConfig, self.peft_config[self.router])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the experts, in order of their arrival."""
        return tuple(self.options.tasks)

    @property
    def mode(self) -> tuple[str, str | None]:
        """("routed", None), ("expert", task), ("gate", task) or, where several experts are summed, ("sum", None)."""
        active = self.active_adapters
        if active == [self.router]:
            return "routed", None
        if len(active) != 1:
            return "sum", None
        gated = any(active[0] in layer.lora_variant for _, layer in self.layers())
        return ("gate" if gated else "expert"), active[0]

    def add_expert(self, task: str, **changes: Any) -> None:
        """Add the expert of a new task: zero output, routing vector zero. No tensor of another expert changes.

        Args:
            task: its name.
            changes: options of `LoraConfig` that differ from those of the `RoutedLoraConfig`, such as `r`.

        Raises:
            AdapterError: if the name is taken or cannot be one, or an option makes no sense.
        """
        self._add(task, self.options.expert(**changes))

    def load_expert(self, folder: str, task: str, *, check_base: bool = True, **hub: Any) -> None:
        """Add an expert from a folder of PEFT with a plain LoRA, made here or by anybody else.

        Its routing vector comes along if it was saved here; otherwise it is zero, and to be trained or filled.

        Args:
            folder: or the name of a repository of the hub.
            task: name that the expert gets.
            check_base: whether the name of the base it was trained on has to be that of this base.
            hub: arguments of PEFT's loading functions, such as `subfolder` and `revision`.

        Raises:
            AdapterError: if it is no plain LoRA, or belongs to another base. The pool is as before.
        """
        config, weights = expert_files.read(folder, task, **hub)
        check_lora_fields(config)
        if check_base:
            expert_files.check_name(config, self.model, folder)
        self._add(task, config)
        try:
            expert_files.put(self.model, task, weights, folder)
        except BaseException:
            self.delete_adapter(task)
            raise

    def train_expert(self, task: str) -> None:
        """Use this expert alone and train its LoRA; everything else is frozen (stage 1 of arXiv 2511.01831)."""
        self._check_task(task)
        self.set_adapter(task)

    def use_expert(self, task: str) -> None:
        """Use this expert alone, nothing trained: its task is known."""
        self._check_task(task)
        self.set_adapter(task, inference_mode=True)

    def train_gate(self, task: str) -> None:
        """Use this expert behind its sigmoid gate and train the gate alone (stage 2)."""
        self.train_expert(task)
        for _, layer in self.layers():
            layer.gate_only(task)
            layer.set_adapter(task)

    def route(self, **options: Any) -> None:
        """Let every token choose among the experts; nothing is trained.

        Args:
            options: of `RoutedLoraConfig`, kept from now on: top_k, score, granularity, temperature, null_expert.

        Raises:
            AdapterError: if there is no expert, fewer than `top_k` given here, an expert without a routing vector
                among several, or a null expert that was never fitted.
        """
        unknown = next((name for name in options if name not in _OPTIONS), None)
        if unknown is not None:
            raise AdapterError(f"unknown option '{unknown}'", where="route", mend=nearest(unknown, _OPTIONS))
        config = self.options
        replace(config, **options)
        if not config.tasks:
            raise AdapterError("there is no expert to route to", where="route", mend="Add one: add_expert(task).")
        if options.get("top_k", 1) > len(config.tasks):
            what = f"top_k is {options['top_k']}, but there are {len(config.tasks)} experts"
            raise AdapterError(what, where="top_k", mend=f"Give at most {len(config.tasks)}.")
        fitted = options.get("score", config.score) == DISCRIMINANT
        if options.get("null_expert", config.null_expert) and not fitted and not gates.null_is_fitted(self):
            raise AdapterError("the null expert was never fitted", where="null_expert", mend="Call fit_null(batches).")
        several = config.tasks if len(config.tasks) > 1 else []
        empty = [task for task in several if gates.is_empty(self, task)]
        if empty:
            mend = "Train it with train_gate, fill it with fill_gate, or fit it with fit_gate."
            raise AdapterError(f"expert '{empty[0]}' has no routing vector", where="route", mend=mend)
        unfitted = [task for task in several if fitted and not gates.is_fitted(self, task)]
        if unfitted:
            what = f"the routing vector of expert '{unfitted[0]}' is no discriminant"
            raise AdapterError(what, where="score", mend="Fit it with fit_gate, or route by another score.")
        for name, value in options.items():
            setattr(config, name, value)
        self.set_adapter(self.router, inference_mode=True)

    def fill_gate(self, task: str, batches: Iterable[Mapping[str, Tensor]] | None = None) -> None:
        """Fill the routing vectors of an expert without training.

        Args:
            task: the expert.
            batches: of its task: the vectors become the mean input of each layer over their real tokens, with the
                expert active ("average activation", PHATGOOSE section 4). None: the direction that the expert answers
                most strongly to (the prototype of Arrow, arXiv 2405.11157), to be used with score="arrow".

        Raises:
            AdapterError: if there is no such expert, or no batch.
        """
        self._check_task(task)
        with self._in_mode():
            self.use_expert(task)
            gates.fill(self, task, batches)

    def fit_gate(
        self,
        task: str,
        batches: Iterable[Mapping[str, Tensor]],
        background: Iterable[Mapping[str, Tensor]],
        ridge: float = 0.1,
    ) -> None:
        """Fit the routing vectors of an expert in closed form, for score="discriminant". Our own: neither paper has it.

        In every layer the vector and its offset tell the task's prompts from those of a background by the logarithm of
        a density ratio (`scores.discriminant`). Nothing is trained and no other expert is looked at. The null expert
        needs no fitting then: its score is 0, so that prompts more like the background are left to the base.

        Args:
            task: the expert.
            batches: of its training prompts, some hundred; with `labels`, tokens whose label is not -100 are left out.
            background: of what the base alone shall go on answering; the same sample for every expert.
            ridge: added to the background's covariance, as a share of its mean variance.

        Raises:
            AdapterError: if there is no such expert, no batch, a ridge of 0 or below, or routing is by token.
        """
        self._check_task(task)
        if not ridge > 0:
            raise AdapterError(f"ridge is {ridge!r}", where="ridge", mend="Give a number above 0.")
        if self.options.granularity == "token":
            mend = "Make the pool with granularity='model' or 'sequence', or call route(granularity=...) first."
            raise AdapterError("discriminants are of whole prompts, not of tokens", where="granularity", mend=mend)
        with self._in_mode():
            gates.fit(self, task, batches, background, ridge)

    def fit_null(self, batches: Iterable[Mapping[str, Tensor]], share: float = 0.9) -> None:
        """Fit the null expert to a sample of what the base alone shall go on answering, and let it take part.

        Its vector is the mean input of each layer; its offset such that for `share` of the sample's tokens its score
        is the best of all. Our own extension: neither paper has one. Fit it again after a new expert.

        Args:
            batches: of the foundation sample; read twice.
            share: of its tokens, between 0 and 1.

        Raises:
            AdapterError: if there is no expert, no batch, or the share is none.
        """
        if not self.tasks:
            raise AdapterError("there is no expert yet", where="fit_null", mend="Add one first: add_expert(task).")
        if self.options.score == DISCRIMINANT:
            mend = "Call route(null_expert=True)."
            raise AdapterError("with discriminant scores the null expert needs no fitting", where="score", mend=mend)
        if not 0 < share < 1:
            raise AdapterError(f"share is {share!r}", where="share", mend="Give a number between 0 and 1.")
        with self._in_mode():
            self.set_adapter(self.router, inference_mode=True)
            gates.fit_null(self, list(batches), share)
        self.options.null_expert = True

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT: an expert or several, summed, or the router alone. Ends the training of a gate."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            if name not in self.peft_config:
                raise AdapterError(f"there is no expert '{name}'", mend=nearest(name, self.peft_config))
        if len(names) > 1 and self.router in names:
            raise AdapterError("the router cannot be summed with experts", mend="Activate it alone: route().")
        for _, layer in self.layers():
            layer.gate_only(None)
        super().set_adapter(names, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an expert with its gate; the router is active afterwards."""
        if adapter_name == self.router:
            raise AdapterError("the router cannot be deleted", mend="Get the base back with unload().")
        self._check_task(adapter_name)
        self.set_adapter(self.router, inference_mode=True)
        super().delete_adapter(adapter_name)
        self.options.tasks.remove(adapter_name)

    def _add(self, task: str, config: LoraConfig) -> None:
        expert_files.check_task_name(self.model, task, self.peft_config)
        config.inference_mode = False
        before, active = self.mode, self.active_adapters
        config.target_modules = self._prepare_adapter_config(config, {}).target_modules
        here = {name for name, _ in self.layers()}
        elsewhere = sorted(matched(self.model, config.target_modules or set()) - here)
        if elsewhere:
            mend = "Let the RoutedLoraConfig target every layer that an expert has."
            raise AdapterError(f"expert '{task}' has the layer '{elsewhere[0]}', which has no router", mend=mend)
        self.peft_config[task] = config
        try:
            self.inject_adapter(self.model, task)
        except BaseException:
            self.peft_config.pop(task, None)
            raise
        self._cast_adapter_dtype(task)
        self.options.tasks.append(task)
        self._back_to(before, active)

    def _check_task(self, task: str) -> None:
        if task not in self.options.tasks:
            raise AdapterError(f"there is no expert '{task}'", mend=nearest(task, self.options.tasks))

    def _back_to(self, mode: tuple[str, str | None], active: list[str]) -> None:
        trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        if mode[0] == "gate" and mode[1] is not None:
            self.train_gate(mode[1])
            return
        self.set_adapter(active, inference_mode=not trained)

    @contextmanager
    def without_experts(self) -> Iterator[None]:
        """The base alone inside of `_in_mode`, which puts back what was trained."""
        self.disable_adapter_layers()
        try:
            yield
        finally:
            self.enable_adapter_layers()

    @contextmanager
    def _in_mode(self) -> Iterator[None]:
        """Come back afterwards to the mode, and to what was trained, of before."""
        before, active = self.mode, self.active_adapters
        training = [(module, module.training) for module in self.model.modules()]
        trained = [(p, p.requires_grad) for p in self.model.parameters()]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._back_to(before, active)
            for module, was in training:
                module.training = was
            for parameter, was in trained:
                parameter.requires_grad_(was)

    def _check_new_adapter_config(self, config: Any) -> None:
        super()._check_new_adapter_config(config)
        if sum(isinstance(other, RoutedLoraConfig) for other in self.peft_config.values()) > 1:
            raise AdapterError("the model has a router already", mend="Add experts with add_expert(task).")

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        config = super()._prepare_adapter_config(peft_config, model_config)
        if isinstance(config, RoutedLoraConfig):
            config.awaited, config.tasks = list(config.tasks), []
        return config

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        return RoutedLoraModel._new_layer(lora_config, adapter_name, target, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if isinstance(config, RoutedLoraConfig) and config.awaited:
            tuner = getattr(model, "base_model", None)
            expert_files.load_all(tuner if isinstance(tuner, cls) else None, config)
        return remapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        by = self.options.granularity
        if self.router in (kwargs.get("adapter_names") or ()) and by != "token":
            mend = "Route by token, or give every sample the name of an expert."
            raise AdapterError(f"adapter_names cannot be mixed with routing by {by}", mend=mend)
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield


def _needs_scouting(config: RoutedLoraConfig, model: nn.Module) -> bool:
    """Whether all layers have to agree on a sample before it runs."""
    if config.granularity != "model" or not config.tasks:
        return False
    return any(isinstance(layer, RoutedLinear) and layer.routes for layer in model.modules())
