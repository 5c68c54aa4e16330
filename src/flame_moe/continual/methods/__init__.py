"""Continual-learning methods by name: a new one is one new file and one line here."""

from __future__ import annotations

from flame_moe.continual.methods.base import Commit, Method, MethodState, Round, Setting, StageContext, concludes
from flame_moe.continual.methods.ewc import EWC
from flame_moe.continual.methods.finetune import FineTune
from flame_moe.continual.methods.flame import FlameCL
from flame_moe.continual.methods.frozen import Frozen
from flame_moe.continual.methods.gpm import GPM
from flame_moe.continual.methods.inflora import InfLoRA
from flame_moe.continual.methods.joint import Joint
from flame_moe.continual.methods.lifelong_moe import LifelongMoE
from flame_moe.continual.methods.lora import LoRA, LoRAEqual
from flame_moe.continual.methods.lwf import LwF
from flame_moe.continual.methods.mas import MAS
from flame_moe.continual.methods.moral import MoRAL
from flame_moe.continual.methods.olora import OLoRA
from flame_moe.continual.methods.progressive import ProgressiveNetworks
from flame_moe.continual.methods.replay import Replay
from flame_moe.continual.methods.seed import SEED
from flame_moe.continual.methods.separate import Separate
from flame_moe.errors import RecipeError, nearest
from flame_moe.schema import MethodConfig

_ALL: tuple[type[Method], ...] = (
    *(FlameCL, FineTune, Joint, Separate, Frozen),
    *(LoRA, LoRAEqual, OLoRA, InfLoRA, MoRAL, ProgressiveNetworks),
    *(EWC, MAS, GPM, LwF, Replay, LifelongMoE, SEED),
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}


def make_method(config: MethodConfig) -> Method:
    """The method a recipe names.

    Raises:
        RecipeError: for an unknown name, with the nearest known one; or a key that the method does not read.
    """
    if config.name not in METHODS:
        raise RecipeError(f"unknown method '{config.name}'", where="method.name", mend=nearest(config.name, METHODS))
    return METHODS[config.name](config)


def alike(name: str, config: MethodConfig) -> MethodConfig:
    """Another method's settings: the values of `config` for the keys that both may share, its own defaults otherwise.

    `Method.keys` are shared between methods (a rank); `Method.defaults` mean something else to each.
    """
    shared = METHODS[name].keys if name in METHODS else ()
    return MethodConfig.model_validate({"name": name, **{key: getattr(config, key) for key in shared}})


__all__ = [
    "METHODS",
    "Commit",
    "Method",
    "MethodState",
    "Round",
    "Setting",
    "StageContext",
    "alike",
    "concludes",
    "make_method",
]
