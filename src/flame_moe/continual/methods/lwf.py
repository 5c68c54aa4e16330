"""Learning without forgetting: on new samples, old heads go on saying what they said before."""

from __future__ import annotations

from typing import ClassVar

from flame_moe.continual.methods.distillation import Distils
from flame_moe.continual.methods.finetune import FineTune


class LwF(Distils, FineTune):
    """Fine-tuning with strength * the distillation loss of earlier tasks on the stage's own batches (Li and Hoiem 2016,
    arXiv 1606.09282). A task none of whose modalities the new samples have is not protected by it.

    While a stage is learned the model of the stage before is kept as well; nothing of it is stored.
    """

    name: ClassVar[str] = "lwf"
