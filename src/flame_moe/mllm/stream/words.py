"""The vocabulary of the tiny model, its tokenizer, and how an item becomes token ids for any model of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from flame_moe.foreign import library
from flame_moe.mllm.stream.generated import ALPHABET, COLORS, NUMBERS
from flame_moe.mllm.stream.pictures import SHAPES
from flame_moe.mllm.stream.samples import Item

PAD, UNKNOWN, BEGIN, END, IMAGE, ANSWER = SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", "<image>", "<answer>")
_TASKS = """? what shape is in the image color there a yes no digit this even larger than which bar highest lowest how
many bars are higher first last letter letters word written plus minus or"""
_FOUNDATION = """describe picture name object so it : one read number list order sign spell backwards repeat
count on from"""
_RECORDED = """does contain present not of with block tower at blocks box top touching and exactly items 1 least base 2
has only towers as edge 3 item square wall that squares different closely over colors any objects above grey all 4 same
having bottom corner contains each circles boxes together stacked atleast triangles right to second more none other
small height below middle most where colour between an have bellow attach nearly side attached either third size"""
WORDS = (
    *SPECIAL,
    *dict.fromkeys((*COLORS, *SHAPES, *NUMBERS, *ALPHABET, *f"{_TASKS} {_FOUNDATION} {_RECORDED}".split())),
)
"""Every word that the tiny model can read or write; the place of a word is its number."""
NUMBER_OF = {word: i for i, word in enumerate(WORDS)}


class Reader(Protocol):
    """How a model of a stream is asked and answers; numbers are token ids."""

    pad: int
    image: int

    def prompt(self, item: Item, patches: int) -> list[int]:
        """What the model is given, with `patches` places for picture features where there is a picture."""

    def answer(self, item: Item) -> list[int]:
        """What it should say, the end included."""


class WordReader:
    """The tiny models': one number per word, the picture first; unknown words share one number.

    Args:
        words: the vocabulary, `SPECIAL` first.
    """

    pad = NUMBER_OF[PAD]
    image = NUMBER_OF[IMAGE]

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        self._number = {word: i for i, word in enumerate(words)}

    def prompt(self, item: Item, patches: int) -> list[int]:
        words = self._words(item.question)
        return [NUMBER_OF[BEGIN], *[self.image] * patches, *words, NUMBER_OF[ANSWER]]

    def answer(self, item: Item) -> list[int]:
        return [*self._words(item.answer), NUMBER_OF[END]]

    def _words(self, text: str) -> list[int]:
        return [self._number.get(word, self._number[UNKNOWN]) for word in text.split()]


class ChatReader:
    """An instruction-tuned language model's: the picture, or its scene in words, then the question, in its chat format.

    Args:
        tokenizer: of transformers, with the tokens <|im_start|> and <|im_end|>.
        image: the token that pictures stand for; default none, for models that read text alone.
    """

    def __init__(self, tokenizer: Any, image: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.image = -1 if image is None else int(tokenizer.convert_tokens_to_ids(image))
        self.end = int(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        self.pad = self.end

    def prompt(self, item: Item, patches: int) -> list[int]:
        asked = f"{item.question}<|im_end|>\n<|im_start|>assistant\n"
        if patches:
            return [*self._ids("<|im_start|>user\n"), *[self.image] * patches, *self._ids(f"\n{asked}")]
        return self._ids(f"<|im_start|>user\n{item.scene} . {asked}" if item.scene else f"<|im_start|>user\n{asked}")

    def answer(self, item: Item) -> list[int]:
        return [*self._ids(item.answer), self.end]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def word_tokenizer() -> Any:
    """The tiny model's tokenizer as one of transformers, to be saved beside the model and used by anybody."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    inner = Tokenizer(WordLevel(dict(NUMBER_OF), unk_token=UNKNOWN))
    inner.pre_tokenizer = WhitespaceSplit()
    names = {"pad_token": PAD, "unk_token": UNKNOWN, "bos_token": BEGIN, "eos_token": END}
    extra = {"image_token": IMAGE}
    return library().PreTrainedTokenizerFast(tokenizer_object=inner, **names, extra_special_tokens=extra)
