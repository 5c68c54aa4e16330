"""What exists and what is asked: modalities, tasks, stages and recipes.

Frozen, keyword-only, validated with a sentence; an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from flame_moe.description import Description
from flame_moe.errors import RecipeError

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
ModalityKind = Literal["series", "timed", "patches", "table", "codes", "image", "waveform", "tokens"]
Storage = Literal["<f4", "<i4", "|u1"]
TaskKind = Literal["binary", "multiclass", "multilabel", "regression"]
Preset = Literal["residual", "paper", "reference", "no_moe", "dense", "shared_router"]
SPLITS: tuple[str, ...] = ("train", "val", "test")


class Pretrained(Description):
    """A pre-trained model whose weights an encoder starts from.

    Attributes:
        folder: where it was when the store was prepared.
        files: of the model, name -> SHA-256; the stage that first trains it insists on them.
        config: its config.json: all that is needed to build it without weights.
    """

    folder: str
    files: dict[str, str]
    config: dict[str, Any]


class Modality(Description):
    """One kind of input, a sequence of feature vectors per sample.

    Kinds:
        series: values (L, C) at irregular times (L,), each cell observed or not (vital signs, laboratory values).
        timed: whole vectors (L, C) at times (L,) (embeddings of notes, images, waveforms).
        patches: an ordered sequence of vectors (L, C) without times (image patches, strokes, blocks of a volume).
        table: one vector (1, C), each cell observed or not.
        codes: events (L, 2) at times (L,): the number of the event's type and `flame_moe.data.codes.code_id` of its
            code; whole numbers.
        image: pictures (L, H W channels) at times (L,), 0..255, of the size that `shape` says.
        waveform: evenly sampled signals (L, C), thousands of steps without times (an electrocardiogram).
        tokens: pieces of texts (L, C) at times (L,): the number of each token plus 1, then 0; whole numbers.

    Times are hours since the sample's origin divided by its window, so 0..1 for every modality.

    Attributes:
        channels, units: names and units of the features, where they have any.
        scaling: how values are made comparable, fitted on the training split; codes and images have their own.
        types: of codes: the names of the event types; an event's type is a position in this list.
        vocabulary: of codes: how many different codes get an embedding of their own, the most frequent of training.
        shape: of images: (H, W, channels).
        rate: of waveforms: samples per second.
        pretrained: of tokens: the model that reads them, whose tokenizer numbered them.
    """

    name: Name
    kind: ModalityKind
    features: Annotated[int, Field(ge=1)]
    channels: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    scaling: Literal["standard", "quantile", "none"] = "standard"
    types: tuple[str, ...] = ()
    vocabulary: Annotated[int, Field(ge=1)] = 4096
    shape: tuple[Annotated[int, Field(ge=1)], ...] = ()
    rate: Annotated[float, Field(gt=0)] | None = None
    pretrained: Pretrained | None = None
    description: str = ""

    @model_validator(mode="after")
    def _kind_fits(self) -> Self:
        if self.kind == "codes" and (self.features != 2 or not self.types):
            raise ValueError(f"modality '{self.name}' holds codes: it needs features = 2 and the names of its types")
        if self.kind == "image" and (len(self.shape) != 3 or math.prod(self.shape) != self.features):
            what = f"features = height * width * channels, not {self.features} with shape {self.shape}"
            raise ValueError(f"modality '{self.name}' holds images: it needs {what}")
        if (self.kind == "tokens") != (self.pretrained is not None):
            what = "holds tokens: it needs" if self.kind == "tokens" else f"is {self.kind}: only tokens have"
            raise ValueError(f"modality '{self.name}' {what} a pretrained model")
        return self

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        for label, names in (("channels", self.channels), ("units", self.units)):
            if names and len(names) != self.features:
                raise ValueError(f"modality '{self.name}' has {self.features} features but {len(names)} {label}")
        if len(set(self.channels)) != len(self.channels):
            raise ValueError(f"modality '{self.name}' names a channel twice")
        return self

    @property
    def has_times(self) -> bool:
        return self.kind in ("series", "timed", "codes", "image", "tokens")

    @property
    def has_observed(self) -> bool:
        return self.kind in ("series", "table")

    @property
    def storage(self) -> Storage:
        """How a value lies on the disk: little-endian numpy type."""
        return "<i4" if self.kind in ("codes", "tokens") else "|u1" if self.kind == "image" else "<f4"


class Task(Description):
    """A prediction target and the modalities it reads, in the order in which the head sees them.

    `classes` names the outputs: two for binary (negative, positive), one per class for multiclass, one per label for
    multilabel, one per value for regression. Targets are stored as float32: (1,) holding 0/1 or the class index,
    (n_labels,) of 0/1, or (n_values,) in natural units; NaN means that the sample has no label.
    """

    name: Name
    kind: TaskKind
    modalities: Annotated[tuple[Name, ...], Field(min_length=1)]
    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    family: str = "default"
    interaction: Literal["spread", "concentrate", "none"] = "spread"
    loss: Literal["plain", "weighted", "focal"] = "plain"
    weight: Annotated[float, Field(gt=0)] = 1.0
    description: str = ""
    caveat: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"task '{self.name}' names a modality twice")
        if self.kind == "binary" and len(self.classes) != 2:
            raise ValueError(f"binary task '{self.name}' needs exactly two classes (negative, positive)")
        if self.kind == "multiclass" and len(self.classes) < 2:
            raise ValueError(f"multiclass task '{self.name}' needs at least two classes")
        if self.kind == "regression" and self.loss != "plain":
            raise ValueError(f"regression task '{self.name}' has no classes to weight: use loss = 'plain'")
        return self

    @property
    def outputs(self) -> int:
        """Width of the logits: 1 for binary, else one per class, label or value."""
        return 1 if self.kind == "binary" else len(self.classes)

    @property
    def target_width(self) -> int:
        """Width of the stored target."""
        return len(self.classes) if self.kind in ("multilabel", "regression") else 1


class TaskOverride(Description):
    """What a recipe may change of a store's task."""

    modalities: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    interaction: Literal["spread", "concentrate", "none"] | None = None
    loss: Literal["plain", "weighted", "focal"] | None = None
    weight: Annotated[float, Field(gt=0)] | None = None

    def apply(self, task: Task) -> Task:
        changes = {key: value for key, value in self if value is not None}
        return Task.parse({**task.plain(), **changes}, where=f"tasks.{task.name}")


class Stage(Description):
    """Tasks that are learned jointly, at one point of the stream, and how their training differs from the recipe's."""

    tasks: Annotated[tuple[Name, ...], Field(min_length=1)]
    epochs: Annotated[int, Field(ge=1)] | None = None
    lr: Annotated[float, Field(gt=0)] | None = None
    cell_dropout: Fraction | None = None
    modality_dropout: Fraction | None = None

    @model_validator(mode="after")
    def _unique(self) -> Self:
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError("a stage names a task twice")
        return self

    def settings(self, train: TrainConfig) -> TrainConfig:
        """The recipe's training with what this stage changes."""
        changes = {key: value for key, value in self if key != "tasks" and value is not None}
        return train.model_copy(update=changes)


class DataConfig(Description):
    """Where the samples come from."""

    source: Name
    raw: str | None = None
    store: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    tasks: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None


class ModelConfig(Description):
    """Shape of the network; presets are explained in `flame_moe.nn.block`."""

    preset: Preset = "residual"
    width: Annotated[int, Field(ge=4)] = 64
    heads: Annotated[int, Field(ge=1)] = 4
    blocks: Annotated[int, Field(ge=0)] = 1
    experts: Annotated[int, Field(ge=1)] = 8
    top_k: Annotated[int, Field(ge=1)] = 2
    hidden: Annotated[int, Field(ge=1)] = 128
    kernel: Annotated[int, Field(ge=1)] = 3
    gate: Literal["laplace", "softmax", "gaussian"] = "laplace"
    readout: Literal["last", "mean", "attention"] = "mean"
    dropout: Fraction = 0.1
    steps: Annotated[int, Field(ge=1)] = 24
    time_width: Annotated[int, Field(ge=2)] = 32
    patches: Annotated[int, Field(ge=1)] = 16
    knots: Annotated[int, Field(ge=0)] = 0
    balance: Annotated[float, Field(ge=0)] = 0.01
    interaction: Annotated[float, Field(ge=0)] = 0.1

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.time_width % self.heads:
            raise ValueError(f"time_width {self.time_width} is not a multiple of heads {self.heads}")
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is above the pool of {self.experts} experts")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel {self.kernel} is even: a length-preserving convolution needs an odd width")
        return self


Accelerator = Literal["cpu", "cuda", "auto"]
"""Where a model is; with "auto" on a GPU if there is one."""


class TrainConfig(Description):
    """One loop for every stage."""

    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 64
    lr: Annotated[float, Field(gt=0)] = 1e-3
    pretrained_lr: Annotated[float, Field(gt=0)] = 2e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Fraction = 0.05
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    sampling: Literal["round_robin", "proportional", "temperature"] = "round_robin"
    temperature: Annotated[float, Field(gt=0)] = 2.0
    patience: Annotated[int, Field(ge=1)] | None = None
    select: Literal["joint", "per_task", "last"] = "joint"
    modality_dropout: Fraction = 0.0
    cell_dropout: Fraction = 0.0
    label_smoothing: Fraction = 0.0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    accelerator: Accelerator = "cpu"
    threads: Annotated[int, Field(ge=1)] | None = None
    bootstrap: Annotated[int, Field(ge=0)] = 500


METHOD_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"truncation": "weight", "keep": "rank", "rank": 32},
    "reference": {
        **{"truncation": "weight", "keep": "rank", "rank": 32, "base_rank": 32},
        **{"router": "mean", "router_heads": "all", "load": "count"},
    },
}
"""Two readings of FLAME-CL: as the paper tells it, and what its published code does (docs/continual.md)."""
SIZED = ("flame", "lora_equal")
"""Methods that read `keep`: for them a `rank` or an `energy` without `keep` is what decides."""


class MethodConfig(Description):
    """How a later stage is learned (`flame_moe.continual.methods`).

    A preset stands for values of other keys; a key that is given goes before it. Where `keep` is not given, a `rank` or
    an `energy` that is given decides how much a stage keeps; with `warmup` = 0 the rank does.
    """

    name: Name = "flame"
    preset: Literal["paper", "reference"] | None = None
    truncation: Literal["weight", "activation", "loss", "none"] = "loss"
    keep: Literal["rank", "energy", "budget"] = "budget"
    rank: Annotated[int, Field(ge=0)] | None = 16
    strength: Annotated[float, Field(ge=0)] | None = None
    decay: Annotated[float, Field(ge=0, le=1)] | None = None
    samples: Annotated[int, Field(ge=1)] | None = None
    memory: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(gt=0)] | None = None
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    experts: Annotated[int, Field(ge=1)] | None = None
    warm_start: bool = False
    energy: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    budget: Annotated[float, Field(gt=0.0)] = 0.1
    bias_correction: bool = False
    warmup: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    recalibrate: Annotated[int, Field(ge=0)] = 0
    base_rank: Annotated[int, Field(ge=1)] | None = None
    router: Literal["own", "mean", "sum", "max"] = "own"
    router_heads: Literal["stage", "all"] = "stage"
    load: Literal["expected", "count"] = "expected"

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        preset = data.get("preset")
        data = {**(METHOD_PRESETS.get(preset, {}) if isinstance(preset, str) else {}), **data}
        # Factors from zero can only be sized by a rank.
        given = [key for key in ("rank", "energy") if key in data] or ["rank"] * (data.get("warmup") == 0)
        if data.get("name", SIZED[0]) in SIZED and "keep" not in data and given:
            if len(given) > 1:
                raise ValueError("'rank' and 'energy' are given and one can decide: say keep = 'rank' or 'energy'")
            data["keep"] = given[0]
        return data

    @model_validator(mode="after")
    def _decided(self) -> Self:
        for key in ("energy", "budget"):
            if self.keep != key and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"'{key}' is set but keep = '{self.keep}' decides: set keep = '{key}', or leave it out"
                )
        if self.budget > 1 and self.budget != int(self.budget):
            raise ValueError(f"a budget of {self.budget} numbers: give a whole number, or a share below 1")
        if self.warmup == 0 and self.keep != "rank":
            raise ValueError(f"warmup = 0 trains factors from zero, so a rank has to size them, not a {self.keep}")
        return self


class Recipe(Description):
    """Everything a run is made from; with its seed it determines the result.

    `compare` names other methods that learn the same stream from the same first stage, to be held beside this one.
    `identity` keeps with the model what is needed to choose a stage without task identity.
    """

    name: Name
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    tasks: dict[Name, TaskOverride] = Field(default_factory=dict)
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    method: MethodConfig = MethodConfig()
    compare: tuple[Name, ...] = ()
    identity: bool = False

    @model_validator(mode="after")
    def _tasks_once(self) -> Self:
        named = [task for stage in self.stages for task in stage.tasks]
        twice = sorted({task for task in named if named.count(task) > 1})
        if twice:
            raise ValueError(f"task '{twice[0]}' is in two stages; a task is learned once")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a TOML file.

        Raises:
            RecipeError: if the file is missing, is not TOML, or a key or value is wrong.
        """
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError("there is no such recipe", where=str(path), mend="Check the path.") from None
        except OSError as error:
            what = f"the recipe cannot be read ({error.strerror})"
            raise RecipeError(what, where=str(path), mend="Give a TOML file.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe is not valid TOML: {error}", where=str(path)) from None
        return cls.parse(data, where=str(path))
