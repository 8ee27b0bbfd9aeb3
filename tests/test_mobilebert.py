"""MobileBERT on QNLI in small: a random network, a vocabulary of its own, and pairs whose label follows a rule."""

import csv
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENV

pytest.importorskip("transformers", reason="pip install 'r2[nlp]'")
pytest.importorskip("pyarrow", reason="pip install 'r2[nlp]'")
import pyarrow as pa
from pyarrow import parquet
from test_security import composed
from transformers import (
    MobileBertConfig,
    MobileBertForPreTraining,
    MobileBertForSequenceClassification,
    MobileBertTokenizer,
)

from r2 import export, hub, pack, store
from r2.config import UserError
from r2.data.batches import chunk
from r2.data.text import qnli
from r2.dist import World
from r2.palettize import Palette
from r2.quantizers.layers import compressed, quantizable, signal_to_noise, swap
from r2.recipe import Recipe, optimizer_of
from r2.record import read_all
from r2.regularizers import Margin
from r2.report import tables
from r2.training.loop import evaluate, train
from r2.zoo import weights
from r2.zoo.mobilebert import mobilebert, network

ANSWERS = {"who": "anna boris clara david emma felix".split(), "where": "paris london tokyo cairo lima oslo".split()}
OTHERS = "the a of in was on big small old new river house saw made".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "?", *ANSWERS, *sum(ANSWERS.values(), []), *OTHERS]
LENGTH = 32


def pairs(count, seed):
    """QNLI's columns; a sentence answers the question if it names a person for who, a place for where."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        asked, told = draw.choice(list(ANSWERS)), draw.choice(list(ANSWERS))
        words = draw.choices(OTHERS, k=draw.randint(3, 10))
        words.insert(draw.randrange(len(words) + 1), draw.choice(ANSWERS[told]))
        question = " ".join([asked, *draw.choices(OTHERS, k=draw.randint(1, 5)), "?"])
        rows.append((i, question, " ".join(words), "entailment" if asked == told else "not_entailment"))
    return rows


def write_tsv(path, rows, header=("index", "question", "sentence", "label")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n").writerows([header, *rows])


def write_parquet(path, rows):
    _, questions, sentences, labels = zip(*rows, strict=True)
    numbers = [int(label != "entailment") for label in labels]
    parquet.write_table(pa.table({"question": questions, "sentence": sentences, "label": numbers}), path)


def write_model(folder, **settings):
    """What the hub holds: the network as pretrained, without a classifier, and its vocabulary."""
    torch.manual_seed(0)
    config = MobileBertConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        embedding_size=16, intra_bottleneck_size=32, num_feedforward_networks=2, max_position_embeddings=LENGTH,
        classifier_activation=False, initializer_range=0.1, **settings,
    )  # fmt: skip
    model = MobileBertForPreTraining(config)
    model.mobilebert.embeddings.word_embeddings.weight.data[0] = 0.5  # padding that is not zero, as it may be
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    MobileBertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qnli")
    write_tsv(folder / "train.tsv", pairs(2048, 0))
    write_tsv(folder / "dev.tsv", pairs(256, 1))
    return str(folder)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    write_tsv(folder / "train.tsv", pairs(192, 0))
    write_tsv(folder / "dev.tsv", pairs(64, 1))
    return str(folder)


def data(root, source):
    return qnli(str(root), source, "main", "main", LENGTH, 64).to(World())


def tokens(data, count=8):
    return next(data.val(count))[0]


# the data


def test_glue_s_archive_and_the_hub_s_snapshot_are_read_from_the_folder_above(few, source, tmp_path):
    for name in ("QNLI", "qnli"):
        (tmp_path / name / name).parent.mkdir()
        (tmp_path / name / name).symlink_to(few)
        assert data(tmp_path / name, source).fingerprint() == data(few, source).fingerprint()


def test_tsv_and_parquet_are_read_alike(root, source, tmp_path):
    write_parquet(tmp_path / "train-00000-of-00002.parquet", pairs(2048, 0)[:1000])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", pairs(2048, 0)[1000:])
    write_parquet(tmp_path / "validation-00000-of-00001.parquet", pairs(256, 1))
    first, second = data(root, source), data(tmp_path, source)
    assert (first.train_images, first.val_images, first.num_classes) == (2048, 256, 2)
    for split in ("_train", "_val"):
        a, b = (vars(getattr(found, split)) for found in (first, second))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_pairs_become_the_model_s_tokens(root, source):
    inputs, labels = next(data(root, source).val(256))
    _, question, sentence, label = pairs(256, 1)[3]
    ids = [VOCABULARY.index(word) for word in ["[CLS]", *question.split(), "[SEP]", *sentence.split(), "[SEP]"]]
    assert inputs["input_ids"][3, : len(ids)].tolist() == ids and inputs["input_ids"][3, len(ids) :].sum() == 0
    assert inputs["attention_mask"][3].sum() == len(ids)
    assert inputs["token_type_ids"][3].sum() == len(sentence.split()) + 1
    assert labels[3] == (label != "entailment")


def test_a_long_pair_is_cut(root, tmp_path):
    source = write_model(tmp_path)
    inputs, _ = next(qnli(root, str(source), "main", "main", 10).to(World()).val(256))
    assert inputs["input_ids"].shape == (256, 10) and (inputs["attention_mask"].sum(1) == 10).any()


def test_batches_depend_on_seed_epoch_and_position_alone(root, source):
    whole = data(root, source)
    batches = list(whole.train(64, seed=1, epoch=2))
    late = list(whole.train(64, seed=1, epoch=2, start=30))
    assert len(batches) == 32 and all(
        torch.equal(a[0][name], b[0][name]) and torch.equal(a[1], b[1])
        for a, b in zip(batches[30:], late, strict=True)
        for name in a[0]
    )
    assert not torch.equal(batches[0][1], next(whole.train(64, seed=1, epoch=3))[1])
    halves = [next(whole.to(World(rank, 2)).train(64, seed=1, epoch=2)) for rank in (0, 1)]
    assert torch.equal(torch.cat([labels for _, labels in halves]), batches[0][1])
    widths = {inputs["input_ids"].shape[1] for inputs, _ in batches}
    assert len(widths) > 1 and max(widths) < LENGTH  # padded to the longest of each


def test_a_batch_s_padding_does_not_change_logits(few, source):
    torch.manual_seed(0)
    model = mobilebert(2, source, "main").eval()
    inputs = tokens(data(few, source), 64)
    wide = {name: torch.nn.functional.pad(x, (0, LENGTH - x.shape[1])) for name, x in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), model(wide), atol=1e-6, rtol=1e-5)
        narrow = {name: x[:, :-1] for name, x in inputs.items()}  # without the column that stays
        assert not torch.allclose(model(inputs), model(narrow), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "rows, header, expected",
    [
        (pairs(4, 0), ("index", "sentence1", "sentence2", "label"), "train.tsv: has columns index, sentence1"),
        ([(0, "who ?", "anna", "yes")], None, "train.tsv: row 1 has label 'yes'; known are entailment"),
        ([*pairs(2, 0), (2, "who ?")], None, "train.tsv: row 3 has 2 fields, the header 4"),
        ([], None, "train.tsv: has no rows"),
    ],
)
def test_a_tsv_that_is_not_qnli_s_is_named(source, tmp_path, rows, header, expected):
    write_tsv(tmp_path / "train.tsv", rows, header or ("index", "question", "sentence", "label"))
    write_tsv(tmp_path / "dev.tsv", pairs(4, 0))
    with pytest.raises(UserError, match=expected):
        data(tmp_path, source)


def test_files_that_are_missing_damaged_or_without_labels_are_named(source, tmp_path):
    write_tsv(tmp_path / "train.tsv", pairs(4, 0))
    with pytest.raises(UserError, match=r"has no dev\* or validation\* in TSV or Parquet"):
        data(tmp_path, source)
    file = tmp_path / "validation.parquet"
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="validation.parquet: cannot be read as Parquet"):
        data(tmp_path, source)
    for column, expected in (([-1], "row 1 has label -1"), ([None], "row 1 has label None")):  # as a test split has
        parquet.write_table(pa.table({"question": ["who"], "sentence": ["anna"], "label": column}), file)
        with pytest.raises(UserError, match=expected):
            data(tmp_path, source)
    parquet.write_table(pa.table({"question": [None], "sentence": ["anna"], "label": [0]}), file)
    with pytest.raises(UserError, match="row 1 lacks a question"):
        data(tmp_path, source)
    (tmp_path / "dev.tsv").write_bytes(b"question\tsentence\tlabel\n\xff\t\t\n")
    with pytest.raises(UserError, match="dev.tsv: cannot be read as TSV"):
        data(tmp_path, source)


# the model


def test_the_classifier_alone_is_new_and_follows_the_seed(source):
    built = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        built.append(mobilebert(2, source, "main").state_dict())
    first, same, other = built
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert {name for name in first if not torch.equal(first[name], other[name])} == {"classifier.weight"}
    saved = MobileBertForPreTraining.from_pretrained(source).state_dict()
    assert all(torch.equal(saved[name], first[name]) for name in first if not name.startswith("classifier."))


def test_every_layer_is_regularized_and_compressed(source):
    with torch.device("meta"):
        model = mobilebert(2, source, "main")
    layers = list(quantizable(model))
    embeddings = [f"mobilebert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")]
    assert layers[:4] == [*embeddings, "mobilebert.embeddings.embedding_transformation"]
    assert layers[-1] == "classifier" and len(layers) == 4 + 2 * 11 + 1
    matrices = [name for name, p in model.named_parameters() if p.ndim == 2]
    assert matrices == [f"{name}.weight" for name in layers]
    assert list(Margin(mobilebert(2, source, "main"))._named) == matrices


@pytest.mark.parametrize("padded", [True, False])
def test_logits_are_those_of_transformers_own_mask(source, padded):
    model, ids = mobilebert(2, source, "main").eval(), torch.randint(len(VOCABULARY), (4, LENGTH))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids % 2}
    if padded:
        inputs["attention_mask"][1:, 10:] = 0
    with torch.no_grad():
        assert torch.equal(model(inputs), super(type(model), model).forward(**inputs).logits)


def test_the_published_network_has_its_size():
    with torch.device("meta"):
        model = network(2, {"classifier_activation": False})  # else the defaults are google/mobilebert-uncased's
    assert sum(p.numel() for p in model.parameters()) == 24_582_914
    assert sum(m.weight.numel() for m in quantizable(model).values()) == 24_421_632 and len(quantizable(model)) == 365


def test_weights_of_an_older_file_are_read(source, tmp_path):
    for name in ("config.json", "vocab.txt"):  # what the hub's repository has
        shutil.copy(f"{source}/{name}", tmp_path)
    saved = MobileBertForPreTraining.from_pretrained(source).state_dict()
    torch.save(saved, tmp_path / "pytorch_model.bin")
    found = mobilebert(2, str(tmp_path), "main").state_dict()
    assert all(torch.equal(found[name], saved[name]) for name in found if name in saved)


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda f: (f / "config.json").unlink(), "its config.json cannot be read"),
        (lambda f: settings(f, model_type="bert"), "is a bert, not a mobilebert"),
        (lambda f: [(f / n).unlink() for n in ("vocab.txt", "tokenizer.json")], "has neither vocab.txt nor tokenizer"),
        (lambda f: settings(f, vocab_size=20), "its tokenizer has 34 tokens, its network only 20"),
        (lambda f: settings(f, max_position_embeddings=16), "data.max_length=32: the network has only 16 positions"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "its tokenizer cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be read .*model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "cannot be read"),
        (lambda f: settings(f, num_hidden_layers=3), "has no weights for .* tensors"),
        (lambda f: settings(f, embedding_size=8), "cannot be read"),
    ],
)
def test_a_source_that_is_no_mobilebert_is_one_line(source, few, tmp_path, change, expected):
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    change(folder)
    with pytest.raises(UserError, match=expected) as error:
        data(few, str(folder))
        mobilebert(2, str(folder), "main")
    assert "\n" not in str(error.value)


def settings(folder, **changed):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


# the hub


def cached(cache, kind, name, revision, folder):
    """The hub's own cache, with one repository in it."""
    shutil.copytree(folder, cache / f"{kind}s--{name.replace('/', '--')}" / "snapshots" / revision)


def test_a_cached_repository_needs_no_network(few, source, tmp_path):
    cached(tmp_path, "model", "google/mobilebert-uncased", "a" * 40, source)
    (tmp_path / "glue").mkdir()
    shutil.copytree(few, tmp_path / "glue" / "qnli")
    cached(tmp_path, "dataset", "nyu-mll/glue", "b" * 40, tmp_path / "glue")
    code = (
        "from r2.data.text import qnli; from r2.zoo.mobilebert import mobilebert;"
        f"name = 'google/mobilebert-uncased'; print(qnli('none', name, {'a' * 40!r}, {'b' * 40!r}, 32).describe());"
        f"print(mobilebert(2, name, {'a' * 40!r}).num_labels)"
    )
    env = {**ENV, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split("\n")[0].startswith("192 training and 64 validation pairs"), done.stderr


@pytest.mark.slow
def test_offline_says_what_to_download_and_where_to_put_it(r2, source, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache"), "R2_DATA": str(tmp_path)}
    model = r2("data=qnli", "model=mobilebert", env=offline)
    given = r2("data=qnli", "model=mobilebert", f"model.source={source}", "data.max_length=32", env=offline)
    expected = [
        ("model.source=google/mobilebert-uncased: is no", "hf download google/mobilebert-uncased --revision 1f90"),
        ("data.root=", "hf download nyu-mll/glue --repo-type dataset --revision bcdc"),
    ]
    for done, texts in zip((model, given), expected, strict=True):
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert all(text in done.stderr for text in texts)
    assert not list(r2.out.glob("pretrained/*"))


def test_a_folder_that_is_not_there_is_no_repository(source):
    with pytest.raises(UserError, match="model.source=/no/such: is no folder, and no name of a repository"):
        mobilebert(2, "/no/such", "main")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'r2\[nlp\]'"):
        hub.need_extra()


# through the loop, the stages and the files


RECIPE = Recipe(epochs=2, batch_size=32, lr=1e-3, weight_decay=0.01, clip_norm=1.0, accumulate=2, optimizer="adamw",
                schedule="linear", channels_last=False)  # fmt: skip


def test_chunks_of_tokens():
    inputs = {"a": torch.arange(10).view(5, 2), "b": torch.arange(5)}
    parts = chunk(inputs, 2)
    assert [list(part) for part in parts] == [["a", "b"]] * 2 and [len(part["b"]) for part in parts] == [3, 2]
    assert torch.equal(torch.cat([part["a"] for part in parts]), inputs["a"])


def test_a_run_cut_in_mid_epoch_resumes_to_the_same_weights(few, source, tmp_path):
    """With dropout in the attention, a regularizer, and two micro-batches per step."""

    def finish(folder, stop_at=None):
        torch.manual_seed(0)
        model, known = mobilebert(2, source, "main"), data(few, source)
        regularizer = Margin(model)
        run = store.Run(store.make_directory(folder), "key", World(), 0, 1e9, lambda row: None)
        whole, steps = known.train, itertools.count(1)

        def batches(*args):
            for batch in whole(*args):
                if next(steps) == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        known.train = batches
        train(model, known, RECIPE, run, "train", [optimizer_of(model, RECIPE, regularizer)], regularizer)
        return store.digest(model.state_dict()), evaluate(model, known, World(), RECIPE)

    expected = finish(tmp_path / "whole")
    with pytest.raises(SystemExit):
        finish(tmp_path / "cut", stop_at=6 + 3)
    assert (tmp_path / "cut" / "train.ckpt").exists()
    assert finish(tmp_path / "cut") == expected
    assert expected[1]["images"] == 64 and 0 < expected[1]["loss"] < 1


@pytest.mark.parametrize("bits, dim, skip", [(1, 1, False), (2, 1, True), (4, 3, False)])
def test_a_packed_palette_has_the_same_logits(few, source, tmp_path, bits, dim, skip):
    torch.manual_seed(0)
    model = mobilebert(2, source, "main")
    layers = quantizable(model, skip)
    swap(layers, lambda _: Palette(bits, dim))
    for layer in compressed(model).values():
        layer.quantizer.initialise(None, layer.weight, layer.operation)
    inputs = tokens(data(few, source), 64)
    assert set(signal_to_noise(model, inputs)) == set(layers)
    pack.save(model, tmp_path / "a.safetensors")
    loaded = pack.load(tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs), loaded(inputs))
    assert compressed(loaded).keys() == layers.keys() and pack.size(loaded) == pack.size(model)
    pack.save(loaded, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert source.encode() not in (tmp_path / "a.safetensors").read_bytes()  # no folder of this machine


@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_a_palette_is_exported_for_any_number_of_pairs_and_tokens(few, source, tmp_path, to):
    torch.manual_seed(0)
    model = mobilebert(2, source, "main")
    swap(quantizable(model), lambda _: Palette(2, 4))
    for layer in compressed(model).values():
        layer.quantizer.initialise(None, layer.weight, layer.operation)
    inputs, path = data(few, source), tmp_path / f"model.{to}"
    export.TARGETS[to].load().write(model.eval(), path, tokens(inputs, 2))
    if to == "onnx":
        onnx = pytest.importorskip("onnx")
        onnx.checker.check_model(onnx.load(path), full_check=True)
    found = export.check(model, path, inputs, World())
    assert found["images"] == 64 and found["equal_predictions"] == 100 and found["largest_difference"] < 1e-5
    one = {name: tensor[:, :9] for name, tensor in tokens(inputs, 1).items()}
    torch.testing.assert_close(export.TARGETS[to].load().predict(path)(one), model(one).detach())


def test_an_uncompressed_network_is_packed_too(few, source, tmp_path):
    model = mobilebert(2, source, "main").eval()
    pack.save(model, tmp_path / "a.safetensors")
    loaded, inputs = pack.load(tmp_path / "a.safetensors"), tokens(data(few, source))
    with torch.no_grad():
        assert torch.equal(model(inputs), loaded(inputs))
    assert pack.size(loaded)["bits_per_weight_all"] == 32


def arguments(source, root, *more):
    return ["data=qnli", "model=mobilebert", f"model.source={source}", f"data.root={root}", "data.max_length=32", *more]


def test_one_cell_through_the_command_line(r2, source, few):
    common = arguments(source, few, "recipe.epochs=1", "recipe.finetune.epochs=1")
    done = r2(*common, "reg=linf", "stage=dkm", "stage.bits=1")
    assert done.returncode == 0, done.stderr
    (path,) = r2.out.glob("*/record.json")
    record = json.loads(path.read_text())
    assert record["name"].startswith("qnli_mobilebert_linf_dkm_w1d1_s0-") and record["versions"]["transformers"]
    assert record["metrics"]["images"] == record["fp32"]["images"] == 64
    assert record["size"]["bits_per_weight_all"] == pytest.approx(1, rel=0.01)
    assert {"classifier", "mobilebert.embeddings.word_embeddings"} < set(record["sqnr_db"])
    assert not tables.protocol(record).full
    pack.load(path.parent / "model.safetensors")
    refused = r2(*common, "stage=ewgs")
    assert refused.returncode == 2 and "an embedding's are token numbers; use stage=dkm" in refused.stderr


def test_a_fine_tuned_network_is_taken_from_a_folder_or_a_file(r2, source, few, tmp_path):
    """As it is, classifier included; of another size it is refused by the first tensor that does not fit."""
    torch.manual_seed(5)
    settings = json.loads((Path(source) / "config.json").read_text())
    tuned = MobileBertForSequenceClassification(MobileBertConfig.from_dict({**settings, "num_labels": 2}))
    tuned.save_pretrained(tmp_path / "tuned")
    torch.save(tuned.state_dict(), tmp_path / "tuned.pth")
    for place in ("tuned", "tuned.pth"):
        config = composed(*arguments(source, few), f"model.weights={tmp_path / place}", "stage=dkm", "stage.bits=1")
        model = weights.load(mobilebert(2, source, "main"), config)
        loaded, architecture = model.state_dict(), model.architecture["settings"]
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tuned.state_dict().items())
    with pytest.raises(UserError, match=r"tuned.pth: \S+ is \(\d+.*\) in the file and .* in mobilebert"):
        weights.fitting(network(2, {**architecture, "intermediate_size": 32}), config)
    with pytest.raises(UserError, match="Is a directory.* it is a file, a folder of save_pretrained"):
        composed(*arguments(source, few), f"model.weights={few}")
    words = [f"model.weights={tmp_path / 'tuned'}", "stage=dkm", "stage.bits=2", "recipe.finetune.epochs=1"]
    done = r2(*arguments(source, few, *words))
    assert done.returncode == 0, done.stderr
    (path,) = r2.out.glob("*/record.json")
    record = json.loads(path.read_text())
    assert record["epochs"]["pretrain"] == 0
    assert record["sha256"]["weights"] == store.sha256_of(tmp_path / "tuned" / "model.safetensors")


@pytest.mark.parametrize(
    "changed, expected",
    [
        (["data=qnli"], "data=qnli: needs a model with a tokenizer; choose model=mobilebert"),
        (["model=mobilebert"], "this recipe has no value for mobilebert"),
    ],
)
def test_text_and_images_do_not_meet(r2, changed, expected):
    done = r2(*changed)
    assert done.returncode == 2 and expected in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_all_cells_of_table_7(source, root, tmp_path):
    """Planned, run and rendered; two bits per weight keep what the network has learned, one is far above chance."""
    learn = ["recipe.epochs=10", "recipe.lr=1e-3", "recipe.finetune.epochs=4", "recipe.finetune.lr=1e-3"]
    asked = [*arguments(source, root, *learn)[2:], f"out={tmp_path}", "jobs=2"]
    command = [sys.executable, "-m", "r2.reproduce", "table=7", *asked]
    for more, expected in ((["plan=true"], "8 missing, which need 4 pretrainings"), ([], "8 runs, 0 finished before")):
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=3000, env=ENV)
        assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr
    records = read_all(tmp_path)
    assert len(records) == 8 and len(list(tmp_path.glob("pretrained/*/model.pt"))) == 4
    cells = {(r["axes"]["reg"], r["axes"]["weight_bits"]): r for r in records}
    assert set(cells) == {(reg, bits) for reg in ("l2", "linf", "margin", "smm") for bits in (1, 2)}
    for (_, bits), record in cells.items():
        assert record["fp32"]["top1"] > 95 and record["metrics"]["top1"] > {1: 75, 2: 90}[bits], record["command"]
        assert record["size"]["bits_per_weight_all"] == pytest.approx(bits, rel=0.01)
    text = (tmp_path / "qnli" / "tables.md").read_text()
    assert "Table 7: DKM of MobileBERT on QNLI" in text and "| mobilebert | L-inf | 90.66 | 63.17 | 82.13 |" in text
    assert (tmp_path / "report.html").exists() and (tmp_path / "qnli" / "figures" / "range_mobilebert.svg").exists()


@pytest.mark.slow
def test_two_processes_follow_one(r2, root, tmp_path):
    source = write_model(tmp_path, attention_probs_dropout_prob=0.0)
    curves = []
    for devices in (1, 2):
        done = r2(*arguments(source, root, f"out={tmp_path / str(devices)}", "recipe.epochs=2", "recipe.lr=1e-3",
                             "reg=linf", f"devices={devices}"))  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        (path,) = Path(tmp_path).glob(f"{devices}/pretrained/*/curve-pretrain.csv")
        rows = csv.DictReader(path.read_text().splitlines())
        curves.append([[float(row["loss"]), float(row["val_loss"])] for row in rows])
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), atol=2e-3, rtol=2e-3)
