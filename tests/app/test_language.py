"""The language models: their sizes, recipes and figures, and the experiments themselves on generated texts."""

import json
import math
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from lightning import Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_topkast.app.data.windows import Windows
from lightning_topkast.app.models import TransformerLM
from lightning_topkast.app.models.transformer import rotate
from lightning_topkast.app.run.build import build_callbacks, build_model
from lightning_topkast.app.run.global_batch import accumulation
from lightning_topkast.app.run.task import ClassificationTask
from lightning_topkast.app.run.train import train
from lightning_topkast.method.targets import find_targets
from tests import processes
from tests.app.data_files import WIKITEXT_WORDS, write_wikitext
from tests.app.test_recipes import rates
from tests.helpers import plain_path

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
LARGE = {
    "enwik8": ["model.width=1024", "model.depth=24", "model.feedforward=3072"],
    "wikitext103": ["model.width=1024", "model.depth=18", "model.heads=16", "model.feedforward=4096"],
}


def built(config):
    with torch.device("meta"):
        return instantiate(config.model, _convert_="all")


def millions(net):
    return sum(parameter.numel() for parameter in net.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "large", "ours", "published"),
    [
        ("enwik8", False, 37.9, 41),
        ("wikitext103", False, 148.1, 151),
        ("enwik8", True, 252.1, 277),
        ("wikitext103", True, 500.8, None),  # there rare words have narrower vectors
    ],
)
def test_models_are_of_the_published_size_but_for_relative_positions(name, large, ours, published, composed):
    """Transformer-XL has one more square matrix a layer, for its relative positions, and a bias for each word."""
    config = composed(f"experiment={name}_transformer_xl", *(LARGE[name] if large else []))
    net = built(config)
    assert millions(net) == pytest.approx(ours, abs=0.06)
    if published:
        relative = config.model.depth * config.model.width**2 + config.data.num_classes
        assert millions(net) + relative / 1e6 == pytest.approx(published, abs=0.6)


def test_words_vectors_are_dense_and_every_matrix_of_the_blocks_is_sparse(composed):
    config = composed("experiment=wikitext103_transformer_xl")
    (callback, *_) = build_callbacks(config, has_loggers=False)
    targets = find_targets(built(config), callback.settings.targets)
    matrices = {target.name: target.sparse for target in targets if len(target.shape) == 2}
    assert matrices.pop("tokens.weight") is False
    assert len(matrices) == 16 * 4
    assert all(matrices.values())


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [1, 2, 5])
@pytest.mark.parametrize(
    ("name", "steps", "epoch"), [("enwik8", 400_000, 90e6 / 512 / 22), ("wikitext103", 200_000, 103_227_021 / 150 / 60)]
)
def test_rate_falls_as_a_cosine_over_the_published_steps_at_every_length(name, steps, epoch, schedule, composed):
    config = composed(f"experiment={name}_transformer_xl", f"recipe.schedule={schedule}")
    assert config.trainer.max_steps == steps * schedule
    assert config.trainer.max_epochs > config.trainer.max_steps / epoch, "the epochs end no run"
    assert config.trainer.max_steps % config.trainer.val_check_interval == 0, "the last step is validated"
    rate = rates(config)
    assert len(rate) == steps * schedule
    quarter = len(rate) // 4
    assert rate[0] == 2.5e-4
    assert rate[quarter] == pytest.approx(2.5e-4 * (1 + math.sqrt(0.5)) / 2)
    assert rate[2 * quarter] == pytest.approx(1.25e-4)
    assert rate[-1] < 1e-10


@pytest.mark.parametrize(
    ("size", "batch_size", "devices", "accumulate"),
    [(22, 22, 1, 1), (22, 11, 2, 1), (24, 6, 4, 1), (60, 15, 1, 4), (60, 15, 4, 1), (64, 8, 8, 1), (64, 8, 1, 8)],
)
def test_batches_that_the_experiments_name_come_out_even(size, batch_size, devices, accumulate):
    assert accumulation(size, batch_size, devices) == accumulate


class Bigrams(nn.Module):
    """The next token depends on the present one alone, so that windows make no difference."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, tokens):
        return F.embedding(tokens, self.table)


@pytest.mark.parametrize(("batch_size", "processes"), [(1, 1), (3, 1), (4, 7), (1, 16)])
def test_perplexity_is_e_to_the_mean_loss_of_every_token(batch_size, processes):
    torch.manual_seed(0)
    table, content = torch.randn(7, 7), torch.randint(0, 7, (47,))
    probabilities = table.softmax(-1)
    lost = [-math.log(probabilities[a, b]) for a, b in pairwise(content)]
    right = [table[a].argmax() == b for a, b in pairwise(content)]

    task = ClassificationTask(Bigrams(table), torch.optim.SGD, num_classes=7, perplexity=True, bits_per_byte=True)
    windows = Windows(content.numpy(), 5, complete=True, multiple=processes)  # 16: the last six are blank
    loader = DataLoader(windows, batch_size, collate_fn=lambda batch: batch)
    (figures,) = Trainer(accelerator="cpu", **QUIET).validate(task, loader, verbose=False)
    assert figures["val/perplexity"] == pytest.approx(math.exp(sum(lost) / 46))
    assert figures["val/loss"] == pytest.approx(sum(lost) / 46)
    assert figures["val/bits_per_byte"] == pytest.approx(sum(lost) / 46 / math.log(2))
    assert figures["val/acc"] == pytest.approx(sum(map(float, right)) / 46)


def test_tied_output_is_the_embedding():
    net = TransformerLM(11, 8, width=8, depth=1, heads=2, tie_output=True)
    assert net.output.weight is net.tokens.weight
    assert millions(TransformerLM(11, 8, width=8, depth=1, heads=2)) - millions(net) == pytest.approx(88 / 1e6)


def test_attention_dropout_is_for_training_only():
    torch.manual_seed(0)
    net = TransformerLM(11, 8, width=8, depth=1, heads=2, attention_dropout=0.5)
    tokens = torch.arange(8)[None]
    assert not torch.equal(net(tokens), net(tokens))
    net.eval()
    assert torch.equal(net(tokens), net(tokens))


SMALL = [
    "model.width=16", "model.depth=2", "model.heads=2", "model.feedforward=32", "data.sequence_length=8",
    "data.batch_size=2", "recipe.global_batch=4", "trainer.val_check_interval=4", "recipe.update_every=2",
]  # fmt: skip
WORDS = ["experiment=wikitext103_transformer_xl", f"data.num_classes={WIKITEXT_WORDS}", *SMALL]
BYTES = ["experiment=enwik8_transformer_xl", "data.split=[18000,1000,1000]", *SMALL]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")
def test_two_processes_train_both_experiments_and_score_as_one_does(composed, data_dir, tmp_path):
    write_wikitext(tmp_path / "data" / "wikitext-103")  # not numbered yet
    words = [*WORDS, "recipe.max_steps=4", "logger=none", "hydra.run.dir=words", f"paths.data_dir={tmp_path}/data"]
    debug = [*BYTES, "debug=fast_dev_run", "logger=none", "hydra.run.dir=bytes", f"paths.data_dir={data_dir}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(plain_path()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("two_ranks.py")), *words, "---", *debug]
    done = processes.run(command, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("GLOBAL_RANK: 1, MEMBER: 2/2") == 2
    assert len(list((tmp_path / "data" / "wikitext-103" / ".topkast").glob("words-*/"))) == 1
    result = json.loads((tmp_path / "words" / "result.json").read_text())
    assert result["monitor"]["name"] == "val/perplexity"

    config = composed(*WORDS, f"paths.data_dir={tmp_path}/data", "trainer=cpu", "logger=none", "callbacks=none")
    data, model = instantiate(config.data), build_model(config)
    checkpoint = torch.load(tmp_path / "words" / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] in (2, 4), "4 batches of 2 on two processes are 4 steps of 4"
    model.load_state_dict(checkpoint["state_dict"])
    (figures,) = Trainer(accelerator="cpu", **QUIET).test(model, data, verbose=False)
    windows = Windows(data.test_set.content, 8, complete=True)
    assert len(windows) % 2 == 1, "one of them would be scored twice"
    assert result["metrics"]["test/perplexity"] == pytest.approx(figures["test/perplexity"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_run_that_is_validated_within_an_epoch_goes_on_exactly(composed, data_dir, tmp_path):
    def last(steps, *overrides):
        train(
            composed(
                *WORDS, f"paths.data_dir={data_dir}", f"recipe.max_steps={steps}", "trainer=cpu", "logger=none",
                "scheduler=none", "model.dropout=0", "test=false", "callbacks.progress=null", *overrides,
            )
        )  # fmt: skip
        return torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)

    whole = last(6)
    shutil.rmtree(tmp_path / "run")
    half = last(4)
    assert (half["global_step"], half["epoch"]) == (4, 0)
    (tmp_path / "half.ckpt").write_bytes((tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes())
    goes_on = last(6, f"ckpt_path={tmp_path}/half.ckpt")
    assert goes_on["global_step"] == whole["global_step"] == 6
    for name, weight in whole["state_dict"].items():
        assert torch.equal(goes_on["state_dict"][name], weight), name
        assert name.startswith("net.")
    assert not torch.equal(half["state_dict"]["net.tokens.weight"], whole["state_dict"]["net.tokens.weight"])


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
