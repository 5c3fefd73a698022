"""Language models: the vocabulary of WikiText, the figures of text, and the published sizes."""

import json
import math
import multiprocessing

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from torch import nn
from torch.nn import functional as F

from lightning_topkast.app.data import WikiText
from lightning_topkast.app.errors import AppError
from lightning_topkast.app.models import TransformerLM
from lightning_topkast.app.models.transformer import rotate
from lightning_topkast.app.task import Perplexity
from lightning_topkast.app.train import build_model, train
from lightning_topkast.targets import find_targets
from tests.app.data_files import write_wikitext

TRAIN = " \n = Title = \n the cat <unk> the \n"
SMALL = {"sequence_length": 2, "batch_size": 2, "num_classes": 6}  # <eos> = the Title cat <unk>


def write(folder, train=TRAIN, valid=" the dog = \n", test=" cat the \n"):
    folder.mkdir(exist_ok=True)
    for part, text in (("train", train), ("valid", valid), ("test", test)):
        (folder / f"wiki.{part}.tokens").write_text(text, encoding="utf-8")


def loaded(folder, **options):
    data = WikiText(str(folder), **{**SMALL, **options})
    data.prepare_data()
    data.setup()
    return data


def numbered(folder):
    return sorted(folder.glob(".words-*"))


def test_words_are_numbered_by_frequency_and_lines_end(tmp_path):
    write(tmp_path)
    data = loaded(tmp_path)
    words = json.loads((numbered(tmp_path)[0] / "words.json").read_text())
    assert words[0] == "<eos>"
    assert set(words[1:3]) == {"=", "the"}, "the two that come twice"
    text = [[words[number] for number in part.content] for part in (data.train_set, data.val_set, data.test_set)]
    assert text[0] == ["<eos>", "=", "Title", "=", "<eos>", "the", "cat", "<unk>", "the", "<eos>"]
    assert text[1] == ["the", "<unk>", "=", "<eos>"], "a word that the training text lacks is unknown"
    inputs, targets = data.val_set[0]
    assert targets.tolist() == data.val_set.content[1:3].tolist()
    assert inputs.dtype == torch.int64


def test_numbers_are_written_once_and_again_when_the_text_changes(tmp_path):
    write(tmp_path)
    loaded(tmp_path)
    (first,) = numbered(tmp_path)
    before = (first / "train.npy").stat().st_mtime_ns
    loaded(tmp_path)
    assert (first / "train.npy").stat().st_mtime_ns == before
    write(tmp_path, train=TRAIN + " a seventh word \n")
    with pytest.raises(AppError, match=r"has 9 different words, but data\.num_classes=6: set data\.num_classes=9"):
        loaded(tmp_path)
    assert len(numbered(tmp_path)) == 2


def test_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path)
    saved = []

    def fail(path, numbers):
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt
        np.array(numbers).tofile(path)

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        loaded(tmp_path)
    assert numbered(tmp_path) == []
    monkeypatch.undo()
    assert len(loaded(tmp_path).train_set.content) == 10


def _prepare(folder):
    WikiText(folder, **SMALL).prepare_data()


def test_processes_that_number_the_same_words_do_not_clash(tmp_path):
    write_wikitext(tmp_path / "w", lines=2000)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(_prepare, [str(tmp_path / "w")] * 4)
    assert len(numbered(tmp_path / "w")) == 1


def test_numbers_go_elsewhere_where_the_text_lies_cannot_be_written(tmp_path):
    write(tmp_path / "text")
    (tmp_path / "file").write_text("")
    with pytest.raises(AppError, match=r"can't be written .* data\.cache="):
        loaded(tmp_path / "text", cache=str(tmp_path / "file"))
    loaded(tmp_path / "text", cache=str(tmp_path / "cache"))
    assert numbered(tmp_path / "text") == []
    assert len(numbered(tmp_path / "cache")) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": " the cat \n"}, r"neither 'dog' nor '<unk>'"),
        ({"test": ""}, r"wiki\.test\.tokens has 0 words"),
    ],
)
def test_text_that_is_none_of_wikitext_is_refused(change, said, tmp_path):
    write(tmp_path, **change)
    with pytest.raises(AppError, match=said):
        loaded(tmp_path, num_classes=3 if "train" in change else 6)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(AppError, match=r"there is no .*wiki\.train\.tokens: fetch it with `curl"):
        loaded(tmp_path, fetch="curl x")
    write(tmp_path)
    (tmp_path / "wiki.valid.tokens").write_bytes(b"\xff\xfe\n")
    with pytest.raises(AppError, match=r"wiki\.valid\.tokens is no text in UTF-8"):
        loaded(tmp_path)


def test_perplexity_is_of_the_mean_loss_over_all_tokens():
    metric = Perplexity()
    logits, targets = torch.randn(10, 7), torch.randint(0, 7, (10,))
    for part in (slice(0, 3), slice(3, 10)):
        metric(F.cross_entropy(logits[part], targets[part]), weight=len(targets[part]))
    expected = torch.softmax(logits, 1)[range(10), targets].log().mean().neg().exp()
    torch.testing.assert_close(metric.compute(), expected)


def test_run_reports_the_metric_that_its_text_has(composed, data_dir, tmp_path):
    tiny = ["model.width=16", "model.depth=1", "model.heads=2", "data.sequence_length=8", "trainer.max_steps=2"]
    score = train(composed("data=wikitext103", f"paths.data_dir={data_dir}", "data.num_classes=12", "data.batch_size=4",
                           "logger=none", "callbacks=none", *tiny))  # fmt: skip
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["test/perplexity"] == pytest.approx(math.exp(metrics["test/loss"]), rel=1e-5)
    assert 5 < score < 20, "about 12 for guessing"
    with pytest.raises(InstantiationException, match="text_metric='bpc' is not valid: expected bits_per_byte"):
        build_model(composed("recipe.text_metric=bpc"))


@pytest.mark.parametrize(
    ("experiment", "millions", "steps", "epoch", "tokens"),
    [("enwik8_transformer_xl", 38.0, 400_000, 90_000_000 // 512, 22 * 512),
     ("wikitext103_transformer_xl", 148.1, 200_000, 103_227_021 // 150, 60 * 150)],
)  # fmt: skip
@pytest.mark.parametrize("schedule", [1, 2, 5])
def test_large_recipes_have_the_published_sizes(experiment, millions, steps, epoch, tokens, schedule, composed):
    config = composed(f"experiment={experiment}", f"recipe.schedule={schedule}")
    with torch.device("meta"):
        model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert config.trainer.max_steps == steps * schedule
    assert config.trainer.max_epochs * (epoch // config.recipe.global_batch) >= steps * schedule, "epochs are no limit"
    assert config.recipe.global_batch * config.data.sequence_length == tokens


def test_tied_words_stay_dense_and_every_projection_is_sparse():
    model = TransformerLM(50, 8, width=16, depth=2, heads=2, tied=True)
    assert model.output.weight is model.tokens.weight
    targets = find_targets(model, keep_first_dense=False, keep_last_dense=False)
    projections = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:-1]
    assert [target.name for target in targets if target.sparse] == [f"{name}.weight" for name in projections]


def test_attention_sees_distances_only():
    """Rotary positions: a product of query and key is the same wherever the two stand, at the same distance."""
    attention = TransformerLM(50, 12, width=10, depth=1, heads=2).blocks[0].attention  # heads of 5, an odd size
    query, key = torch.randn(2, 5)
    turned = [rotate(x.expand(12, 5), attention.cosine, attention.sine) for x in (query, key)]
    products = turned[0] @ turned[1].T
    for distance in range(-11, 12):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert products[0].std() > 0.01, "and differs with it"
