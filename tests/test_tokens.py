"""A text model inside the model: trained where its texts first appear, frozen afterwards, whole in the checkpoint."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flame_moe.batch import ModalityBatch, Observation, Sample
from flame_moe.continual import Learner
from flame_moe.continual.certificate import compare, issue
from flame_moe.continual.probes import synthetic
from flame_moe.data.funnel import Funnel
from flame_moe.data.prepare import prepare
from flame_moe.data.sources.base import SplitSpec
from flame_moe.data.store import Store
from flame_moe.data.text import TextOptions, read_texts, text_modality
from flame_moe.data.writer import StoreWriter
from flame_moe.errors import CheckpointError, DataError, ExtraMissingError, RecipeError
from flame_moe.experiments.baselines import summary_matrix
from flame_moe.nn.encoders import TokenEncoder
from flame_moe.nn.stacked import Settled
from flame_moe.schema import Modality, Stage, Task
from flame_moe.training.optim import parameter_groups
from tests.pretrained import WORDS, tiny_bert, tiny_vit
from tests.tiny import config, recipe

LONG = " ".join(WORDS[i % len(WORDS)] for i in range(50))
TASKS = (
    Task(name="age", kind="binary", modalities=("row",), classes=("no", "yes")),
    Task(name="fever", kind="binary", modalities=("notes", "row"), classes=("no", "yes")),
    Task(name="pain", kind="binary", modalities=("notes",), classes=("no", "yes")),
)
READER = "paths.notes.encoder.reader.module."


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("tokens") / "bert")


@pytest.fixture(scope="module")
def store(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The label of fever and pain is a word in one of two notes."""
    return written(tmp_path_factory.mktemp("store") / "store", bert)


def options(folder: Path, **more: Any) -> TextOptions:
    return TextOptions(encoder=str(folder), **{"chunk": 16, "overlap": 4, "finetune": True, **more})


def samples(folder: Path, number: int) -> Iterator[Sample]:
    draw = np.random.default_rng(0)
    for i in range(number):
        fever, pain = draw.integers(0, 2, 2)
        notes = [f"cough {'fever' if fever else 'no'} distress", f"chest {'pain' if pain else 'arm'}"]
        rows = read_texts(notes, options(folder))
        parts = {"row": Observation(draw.normal(size=(1, 2)).astype(np.float32))}
        if i % 5:
            parts["notes"] = Observation(rows.values, np.array([0.25, 0.5], dtype=np.float32)[rows.owner])
        labels = {"age": parts["row"].values[0, 0] > 0, "fever": fever, "pain": pain}
        yield Sample(f"s{i}", f"p{i}", parts, {k: np.array([v], dtype=np.float32) for k, v in labels.items()})


def written(path: Path, folder: Path, number: int = 120) -> Store:
    modalities = (
        Modality(name="row", kind="table", features=2),
        text_modality("notes", options(folder), "made up"),
    )
    with StoreWriter(path, source="test", options={}, modalities=modalities, tasks=TASKS) as writer:
        for sample in samples(folder, number):
            writer.add(sample)
        funnel = Funnel()
        funnel.start(number)
        return writer.finish(SplitSpec(), funnel)


def reader_of(learner: Learner) -> dict[str, torch.Tensor]:
    state = learner.model.state_dict()
    return {name.removeprefix(READER): t.clone() for name, t in state.items() if name.startswith(READER)}


def plan(*stages: str, **train: Any) -> Any:
    return recipe([(name,) for name in stages], train={"epochs": 2, "pretrained_lr": 1e-3, **train})


def test_texts_are_kept_as_overlapping_pieces_of_the_models_own_tokens(bert: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bert)
    body = tokenizer(LONG, add_special_tokens=False)["input_ids"]
    expected = [[tokenizer.cls_token_id, *body[s : s + 14], tokenizer.sep_token_id] for s in (0, 10, 20, 30, 40)]
    expected.append(tokenizer("no pain")["input_ids"])
    values, owner = read_texts([LONG, "no pain"], options(bert))
    assert owner.tolist() == [0, 0, 0, 0, 0, 1]
    assert values.shape == (6, 16)
    for row, piece in zip(values.tolist(), expected, strict=True):
        assert row == [token + 1 for token in piece] + [0] * (16 - len(piece))


def test_a_step_is_the_mean_over_the_tokens_of_one_piece_whatever_stands_beside_it(bert: Path) -> None:
    from transformers import AutoModel

    modality = text_modality("notes", options(bert), "")
    encoder = TokenEncoder(modality, config(), 0).eval()
    model = AutoModel.from_pretrained(bert).eval()
    encoder.reader.module.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("pooler")}, strict=True
    )
    long, short = (torch.from_numpy(read_texts([text], options(bert)).values) for text in (LONG, "no pain"))
    values = torch.zeros(2, 5, 16, dtype=torch.int32)
    values[0], values[1, :1] = long, short
    times = torch.rand(2, 5).sort(1).values
    got = encoder(ModalityBatch(torch.arange(2), values, torch.tensor([5, 1]), times), 0)
    assert got.mask.tolist() == [[True] * 5, [True] + [False] * 4]
    for row, pieces in enumerate((long, short)):
        for step, piece in enumerate(pieces):
            ids = piece[piece > 0].long() - 1
            with torch.no_grad():
                mean = model(ids[None]).last_hidden_state[0].mean(0)
                time = encoder.time_map(encoder.embed_time(times[row, step], 0), 0) / 8**0.5
                expected = encoder.out(mean, 0) + time
            assert torch.allclose(got.x[row, step], expected, atol=1e-5)
    assert not got.x[1, 1:].any()


def test_the_model_learns_where_its_texts_first_appear_and_stands_still_afterwards(
    bert: Path, store: Store, tmp_path: Path
) -> None:
    from transformers import AutoModel

    pretrained = AutoModel.from_pretrained(bert).state_dict()
    stream = plan("age", "fever", "pain")
    learner = Learner(stream)
    learner.learn(store, stream.stages[0])
    assert not reader_of(learner)
    second = learner.learn(store, stream.stages[1])
    after = reader_of(learner)
    assert second.new_modalities == ("notes",)
    assert set(after) == {name for name in pretrained if not name.startswith("pooler")}
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, pretrained[name])}
    # A bias of the keys shifts all scores of a query alike, so nothing can be learned by it.
    assert set(after) - moved <= {name for name in after if name.endswith("key.bias")}
    before = {task: learner.predict(store, task, store.indices(task)).logits for task in ("age", "fever")}
    learner.learn(store, stream.stages[2])
    assert all(torch.equal(tensor, after[name]) for name, tensor in reader_of(learner).items())
    loaded = Learner.load(learner.save(tmp_path / "model"))
    for task, logits in before.items():
        for found in (learner, loaded):
            np.testing.assert_array_equal(found.predict(store, task, store.indices(task)).logits, logits)


def test_a_model_that_was_saved_needs_neither_the_folder_nor_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_bert(tmp_path / "bert")
    store = written(tmp_path / "store", folder, 60)
    learner = Learner(plan("pain"))
    learner.learn(store, learner.recipe.stages[0])
    indices = store.indices("pain")
    logits = learner.predict(store, "pain", indices).logits
    learner.save(tmp_path / "model")
    shutil.rmtree(folder)

    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    capfd.readouterr()
    loaded = Learner.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict(store, "pain", indices).logits, logits)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(DataError, match=r"the encoder '.*bert' is no folder"):
        Learner(plan("pain")).learn(store, learner.recipe.stages[0])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ExtraMissingError, match=r"flame-moe\[text\]"):
        Learner.load(tmp_path / "model")


def test_a_checkpoint_without_the_models_weights_is_refused(store: Store, tmp_path: Path) -> None:
    from flame_moe.continual.saving import KIND, VERSION
    from flame_moe.training.checkpoint import load_checkpoint, save_checkpoint

    learner = Learner(plan("pain", epochs=1))
    learner.learn(store, learner.recipe.stages[0])
    tensors, manifest = load_checkpoint(learner.save(tmp_path / "model"), kind=KIND, version=VERSION)
    kept = {name: t for name, t in tensors.items() if "word_embeddings" not in name}
    content = {k: v for k, v in manifest.items() if k not in ("format", "version", "tensors")}
    save_checkpoint(tmp_path / "model", kept, content, kind=KIND, version=VERSION)
    with pytest.raises(CheckpointError, match=r"the tensor 'paths\.notes\..*word_embeddings\.weight' is missing"):
        Learner.load(tmp_path / "model")


def test_another_model_in_the_folder_is_refused_before_anything_is_learned(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")
    store = written(tmp_path / "store", folder, 60)
    learner = Learner(plan("age", "pain"))
    learner.learn(store, learner.recipe.stages[0])
    tiny_bert(folder, seed=1)
    with pytest.raises(DataError, match="is not the one with which modality 'notes' was prepared"):
        learner.learn(store, learner.recipe.stages[1])
    assert [stage.index for stage in learner.stages] == [0]
    assert "notes" not in learner.model.modalities
    other = written(tmp_path / "other", folder, 60)
    learner.learn(other, learner.recipe.stages[1])
    assert Learner.load(learner.save(tmp_path / "model")).tasks.keys() == {"age", "pain"}
    with pytest.raises(DataError, match="numbered by the tokenizer of another model"):
        learner.resolve(store, plan("fever").stages[0])


def test_code_that_a_checkpoint_or_store_names_is_not_run(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    plain = text_modality("notes", options(bert), "").plain()
    named = {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}, "_name_or_path": str(tmp_path)}
    plain["pretrained"]["config"] |= named
    encoder = TokenEncoder(Modality.parse(plain, where="notes"), config(), 0)
    assert type(encoder.reader.module).__name__ == "BertModel"
    plain["pretrained"]["config"]["model_type"] = "evil"
    with pytest.raises(DataError, match="the model of type 'evil' cannot be used"):
        TokenEncoder(Modality.parse(plain, where="notes"), config(), 0)
    assert not (tmp_path / "ran").exists()


def test_a_pre_trained_model_has_a_learning_rate_of_its_own_and_no_decay(bert: Path) -> None:
    encoder = TokenEncoder(text_modality("notes", options(bert), ""), config(), 0)
    own, free, apart = parameter_groups(encoder, 0.1, 0.02)
    assert {id(p) for p in apart["params"]} == {id(p) for p in encoder.reader.parameters()}
    assert (apart["rate"], apart["weight_decay"], own["rate"], free["rate"]) == (0.02, 0.0, 1.0, 1.0)
    encoder.reader.commit(lambda delta: delta)
    assert len(parameter_groups(encoder, 0.1, 0.02)) == 2


def test_a_settled_module_does_not_grow() -> None:
    part = Settled(torch.nn.Linear(2, 2), 3)
    part.grow(4)
    assert len(list(part.parameters())) == 2
    part.commit(lambda delta: delta)
    assert not any(p.requires_grad for p in part.parameters())
    part.restore({"stage": 5})
    assert part.structure() == {"stage": 5}


def test_a_summary_counts_pieces_and_the_most_frequent_tokens(bert: Path, store: Store) -> None:
    from transformers import AutoTokenizer

    fever = AutoTokenizer.from_pretrained(bert).convert_tokens_to_ids("fever")
    X, names = summary_matrix(store, np.arange(len(store)), ("notes",))
    there = store.present("notes")
    assert np.isnan(X[~there]).all()
    assert set(X[there, names.index("notes.pieces")]) == {2.0}
    np.testing.assert_array_equal(
        X[there, names.index(f"notes.token{fever}.count")], store.target("fever", np.flatnonzero(there))[:, 0]
    )


def test_a_folder_of_texts_is_prepared_for_fine_tuning(bert: Path, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    rows = [f"s{i},{int(i % 3 == 0)}" for i in range(60)]
    notes = [f"s{i},{h},{LONG if h == 2 else 'no pain'}" for i in range(60) for h in (1, 2)]
    (raw / "samples.csv").write_text("\n".join(["id,died", *rows, ""]))
    (raw / "notes.csv").write_text("\n".join(["id,hour,text", *notes, ""]))
    (raw / "flame.toml").write_text(f"""
        window = 4
        [samples]
        file = "samples.csv"
        [modalities.notes]
        kind = "text"
        file = "notes.csv"
        time = "hour"
        encoder = "{bert}"
        chunk = 16
        overlap = 4
        finetune = true
        [tasks.died]
        kind = "binary"
        column = "died"
    """)
    store = prepare("folder", raw, tmp_path / "store")
    part = store.sample(7).modalities["notes"]
    assert part.times.tolist() == [0.25, 0.5, 0.5, 0.5, 0.5, 0.5]
    np.testing.assert_array_equal(part.values, read_texts(["no pain", LONG], options(bert)).values)
    assert Store.open(store.path).modalities["notes"].pretrained is not None


def test_what_cannot_be_trained_is_refused(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="'ngrams' has nothing to train"):
        TextOptions.parse({"finetune": True}, where="text")
    with pytest.raises(RecipeError, match="holds tokens: it needs a pretrained model"):
        Modality.parse({"name": "m", "kind": "tokens", "features": 2}, where="m")
    with pytest.raises(DataError, match="a model of type 'vit' reads no text"):
        text_modality("notes", options(tiny_vit(tmp_path / "vit")), "")
    with pytest.raises(DataError, match="text 1 of 2 is blank"):
        read_texts(["pain", " "], options(bert))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ExtraMissingError, match=r"flame-moe\[text\]"):
        text_modality("notes", options(bert), "")


def test_a_model_that_reads_texts_can_be_certified(store: Store) -> None:
    learner = Learner(recipe((("age", "fever"),), train={"epochs": 1}))
    learner.learn(store, learner.recipe.stages[0])
    inputs = synthetic(learner.tasks["fever"], learner.model.modalities, learner.preprocessor)
    entry = issue(learner, "fever", inputs, probes="synthetic", environment={}, issued="today")
    assert any(name.startswith(READER) for name in entry.tensors)
    numbers = np.concatenate([s.modalities["notes"].values for s in inputs if "notes" in s.modalities])
    assert numbers[:, 0].min() > 0
    assert (np.diff((numbers > 0).astype(int), axis=1) <= 0).all()
    learner.learn(store, Stage(tasks=("pain",)))
    assert compare(entry, learner, {}).bitwise
