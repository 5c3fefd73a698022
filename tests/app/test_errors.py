"""A mistake on the command line is answered in one line with the nearest valid names, and exit code 2."""

import sys
from pathlib import Path

import pytest

from lightning_topkast.app.commands import train_job
from lightning_topkast.app.errors import did_you_mean, explain


def last_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("topkast-train: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0].removeprefix("topkast-train: ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("modle=cnn", "no config key 'modle': did you mean 'model'?"),
        ("model=cn", "no 'cn' in the group 'model': did you mean 'cnn'?"),
        ("sparsity=topkas", "no 'topkas' in the group 'sparsity': did you mean 'topkast'"),
        ("data=mine", "wikitext103; an option of your own needs --config-dir FOLDER, also beside --resume"),
        ("sparsity.forwrd_sparsity=0.9", "did you mean 'sparsity.forward_sparsity'?"),
        ("max_epochs=3", "did you mean 'recipe.max_epochs' or 'trainer.max_epochs'?"),
        ("hydra.run.dri=x", "did you mean 'hydra.run.dir'?"),
        ("optimizer.momentum=0.9", "valid there: betas, lr, weight_decay; add a new one with +optimizer.momentum="),
        ("experiment=zzz", "valid: ablation_exploration, "),
        ("~sparsity.foo", "no config key 'sparsity.foo'"),
        ("+sparsity.foo=1", "sparsity: TopKastCallback.__init__() got an unexpected keyword argument 'foo'"),
        ("sparsity", "the override 'sparsity' is not valid"),
        ("logger=null", "expected the name of an option for a group, not null: logger=none"),
        ("seed=0,1", "add -m to run each of them, or write seed=[0,1] for a list"),
        ("--config-name trian", "Cannot find primary config 'trian'"),
        ("model=transformer", "data.sequence_length, which is not set: do the model and the data match?"),
        ("model=custom", "model._target_ has no default: set model._target_="),
        ("model=custom model._target_=no_such.Net", "model: Error loading 'no_such.Net'"),
        ("model.hidden=[-1]", "model: "),
        ("model=cnn model.channels=[4,4,4,4,4]", "model: images of [1, 8, 8] are too small for 5 blocks"),
        ("data=text", "data.path has no default: set data.path=..."),
        ("data=text data.path=x data.split=[1,2]", "data: expected split to have three parts"),
        ("data.batch_size=0", "data: batch_size must be at least 1; got 0"),
        ("data.split=[0.8,0.2,0.2]", "the fractions [0.8, 0.2, 0.2] add up to more than 1"),
        ("optimizer.lr=-1", "optimizer: Invalid learning rate: -1"),
        ("scheduler.warmup=2", "expected warmup to be a fraction of the run"),
        ("trainer.max_epochs=-1", "the scheduler needs a run of known length"),
        ("recipe.monitor=val/accuracy trainer.limit_train_batches=1 trainer.max_epochs=1", "val/accuracy"),
        ("sparsity.forward_sparsity=0.7", "expected backward_sparsity <= forward_sparsity, since"),
        ("sparsity.forward_sparsity=1.5", "expected forward_sparsity to be a number in [0, 1), got 1.5"),
        ("sparsity.targets.include=[conv*]", "include: 'conv*' matches no parameter"),
        ("ckpt_path=none.ckpt", "there is no checkpoint "),
        (
            "-m seed=0,1 trainer=ddp_cpu trainer.num_nodes=2",
            "a sweep (-m) cannot start processes on trainer.num_nodes=2",
        ),
    ],
)
def test_mistake_is_answered_in_one_line(arguments, expected, cli):
    code, _, err = cli(*arguments.split(), *([] if "logger" in arguments else ["logger=none"]))
    assert code == 2
    assert expected in last_line(err)


@pytest.mark.parametrize(
    ("arguments", "path", "command"),
    [
        ("data=text data.path=no/book.txt", "no/book.txt", "data.path=..."),
        (
            "data=enwik8",
            "data/enwik8",
            "`curl -L --create-dirs http://mattmahoney.net/dc/enwik8.zip -o data/enwik8.zip",
        ),
        ("data=wikitext103", "data/wikitext-103/wiki.train.tokens", "-o data/wikitext-103-v1.zip && unzip -d data "),
        ("data=cifar10 model=cnn", "data/cifar-10-batches-py", "data.download=true"),
        ("data=imagenet model=cnn", "data/imagenet/train", "https://image-net.org/download"),
        ("data=fashion_mnist data.folder=nowhere", "nowhere", "`apt-get install dataset-fashion-mnist`"),
    ],
)
def test_missing_data_names_the_path_and_the_command(arguments, path, command, cli):
    code, _, err = cli(*arguments.split(), "logger=none")
    assert code == 2
    assert path in last_line(err)
    assert command in last_line(err)


def test_empty_text_file_is_refused(cli, tmp_path):
    (tmp_path / "empty.txt").touch()
    code, _, err = cli("data=text", "data.path=empty.txt", "logger=none")
    assert code == 2
    assert "empty.txt is empty" in last_line(err)


def test_text_shorter_than_one_sequence_is_refused(cli, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    code, _, err = cli("data=text", "data.path=short.txt", "logger=none")
    assert code == 2
    assert "not enough for one sequence" in last_line(err)


def test_damaged_fashion_mnist_names_the_file(cli, tmp_path, data_dir):
    folder = tmp_path / "fashion"
    folder.mkdir()
    for file in (data_dir / "fashion").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    images = folder / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:1000])
    code, _, err = cli("data=fashion_mnist", f"data.folder={folder}", "logger=none")
    assert code == 2
    assert f"{images} is damaged" in last_line(err)


def test_wrong_number_of_classes_is_refused(cli, data_dir):
    code, _, err = cli("data=imagenet", "model=cnn", f"paths.data_dir={data_dir}", "logger=none")
    assert code == 2
    assert "has 2 classes, but data.num_classes=1000: set data.num_classes=2" in last_line(err)


@pytest.mark.parametrize("logger", ["csv", "wandb", "tensorboard"])
def test_logger_folder_that_cannot_be_written_is_refused_before_training(logger, cli, tmp_path):
    (tmp_path / "file").touch()
    code, out, err = cli(f"logger={logger}", f"paths.output_dir={tmp_path}/file/logs")
    assert code == 2
    assert f"the folder {tmp_path}/file/logs is not writable (Not a directory)" in last_line(err)
    assert "Epoch" not in out


def test_run_folder_that_cannot_be_written_is_refused(cli, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = cli(f"hydra.run.dir={tmp_path}/file/run")
    assert code == 2
    assert f"{tmp_path}/file/run" in last_line(err)


def test_truncated_checkpoint_is_refused(cli, tmp_path):
    short = ("trainer.max_epochs=1", "trainer.limit_train_batches=2", "logger=none")
    assert cli(*short, f"paths.output_dir={tmp_path}/run")[0] == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: len(content) // 2])
    code, _, err = cli(*short, f"ckpt_path={checkpoint}")
    assert code == 2
    assert f"the checkpoint {checkpoint} is not complete" in last_line(err)


def test_missing_checkpoint_names_its_neighbours(cli, tmp_path):
    (tmp_path / "last.ckpt").touch()
    code, _, err = cli(f"ckpt_path={tmp_path}/lst.ckpt")
    assert code == 2
    assert "that folder has last.ckpt" in last_line(err)


def test_unknown_errors_keep_their_traceback(cli, monkeypatch):
    def fail(config):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(train_job, "train", fail)
    with pytest.raises(ZeroDivisionError):
        cli()


def test_hydra_full_error_lets_every_error_through(cli, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="Could not find 'model/cn'"):
        cli("model=cn")


def test_configuration_that_no_result_could_hold_is_refused_before_training(cli):
    code, _, err = cli(f"+notes={'[' * 60}1{']' * 60}", "logger=none")
    assert code == 2
    assert "the configuration cannot be recorded: it is nested deeper than 50 levels" in last_line(err)


def test_full_disk_is_one_line_where_the_system_names_no_file():
    assert explain(OSError(28, "No space left on device")).startswith(
        "not written: No space left on device; free space"
    )
    assert explain(OSError(5, "Input/output error")) is None


def test_did_you_mean_lists_all_names_where_none_is_near():
    assert did_you_mean("zzz", ["cnn", "mlp"]) == "valid: cnn, mlp"
    assert did_you_mean("mpl", ["cnn", "mlp"]) == "did you mean 'mlp'?"


def test_torchvision_missing_names_the_extra(cli, monkeypatch, data_dir):
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    code, _, err = cli("data=cifar10", "model=cnn", f"paths.data_dir={Path(data_dir)}", "logger=none")
    assert code == 2
    assert "pip install 'lightning-topkast[vision]'" in last_line(err)
