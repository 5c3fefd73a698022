"""WikiText: words are numbered as for the published perplexities, and the cached numbers are never stale or partial."""

import multiprocessing
import os
import time

import numpy as np
import pytest

from lightning_topkast.app.data import WikiText
from lightning_topkast.app.data import wikitext as wikitext_module
from lightning_topkast.app.data.cache import cached_folder
from lightning_topkast.app.data.vocabulary import count_words, encode
from lightning_topkast.app.data.windows import IGNORED, Windows
from lightning_topkast.app.errors import AppError
from tests.app.data_files import WIKITEXT_WORDS, write_wikitext

TEXT = " \n = Title = \n \n the cat , the dog \n the Cat <unk> \n"
SMALL = {"sequence_length": 8, "batch_size": 4, "num_classes": WIKITEXT_WORDS}


@pytest.fixture
def texts(tmp_path):
    write_wikitext(tmp_path / "texts")
    return tmp_path / "texts"


def wikitext(folder, **options):
    data = WikiText(str(folder), **{**SMALL, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def caches(folder):
    return sorted(path.name for path in (folder / ".topkast").iterdir() if path.suffix != ".lock")


def test_words_are_numbered_by_frequency_after_the_end_of_line(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    vocabulary = count_words(tmp_path / "text")
    assert list(vocabulary) == ["<eos>", "the", "=", "Title", "cat", ",", "dog", "Cat", "<unk>"]
    assert list(vocabulary.values()) == list(range(9))


def test_every_line_ends_with_a_number_of_its_own(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    vocabulary = count_words(tmp_path / "text")
    (tmp_path / "other").write_text("\n the bird\n")
    encode(tmp_path / "other", vocabulary, tmp_path / "numbers")
    assert np.fromfile(tmp_path / "numbers", np.int32).tolist() == [0, 1, vocabulary["<unk>"], 0]
    encode(tmp_path / "text", vocabulary, tmp_path / "numbers")
    assert np.fromfile(tmp_path / "numbers", np.int32).tolist() == [0, 2, 3, 2, 0, 0, 1, 4, 5, 1, 6, 0, 1, 7, 8, 0]


def test_unknown_word_needs_a_place(tmp_path):
    (tmp_path / "text").write_text("bird")
    with pytest.raises(AppError, match="has the word 'bird', but the training text has neither it nor <unk>"):
        encode(tmp_path / "text", {"<eos>": 0}, tmp_path / "numbers")


def test_parts_are_the_three_files_mapped_into_memory(texts):
    data = wikitext(texts)
    assert isinstance(data.train_set.content, np.memmap)
    vocabulary = list(count_words(texts / "wiki.train.tokens"))
    assert len(vocabulary) == WIKITEXT_WORDS
    for part, windows in (("train", data.train_set), ("valid", data.val_set), ("test", data.test_set)):
        lines = (texts / f"wiki.{part}.tokens").read_text().splitlines()
        expected = [word for line in lines for word in [*line.split(), "<eos>"]]
        assert [vocabulary[number] for number in windows.content] == expected
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == targets.shape == (4, 8)


def test_numbers_are_made_once_and_again_when_a_text_changes(texts, monkeypatch):
    made = []
    monkeypatch.setattr(wikitext_module, "encode", lambda *given: [made.append(given[0].name), encode(*given)])
    wikitext(texts)
    wikitext(texts)
    assert len(made) == 3
    valid = texts / "wiki.valid.tokens"
    before = valid.stat()
    valid.write_text(valid.read_text().replace("sparse", "always", 1))  # as long as it was
    os.utime(valid, ns=(before.st_atime_ns, before.st_mtime_ns))  # and as old
    changed = wikitext(texts)
    assert len(made) == 6
    always = list(count_words(texts / "wiki.train.tokens")).index("always")
    assert (changed.val_set.content == always).sum() == valid.read_text().split().count("always")


def test_numbers_go_to_the_users_cache_where_the_texts_are_read_only(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts.chmod(0o555)
    access = os.access  # root may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(texts) and access(path, mode))
    wikitext(texts)
    assert not (texts / ".topkast").exists()
    assert any((tmp_path / "cache" / "lightning-topkast").glob("words-*/train.int32"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    wikitext(texts)  # found, so that nothing needs to be written
    with pytest.raises(AppError, match=r"nothing can be written to .*elsewhere: name a folder .* data\.cache"):
        wikitext(texts, cache=str(tmp_path / "elsewhere"))


def test_killed_writer_leaves_nothing_that_is_taken_for_the_numbers(tmp_path):
    def half(folder):
        (folder / "train.int32").write_bytes(b"half")
        (tmp_path / "begun").touch()
        time.sleep(1000)

    writer = multiprocessing.get_context("fork").Process(target=cached_folder, args=("words", [tmp_path], half))
    writer.start()
    try:
        while not (tmp_path / "begun").exists():
            assert writer.is_alive()
            time.sleep(0.01)
    finally:
        writer.kill()
        writer.join()
    assert not (tmp_path / "words").exists()

    whole = cached_folder("words", [tmp_path], lambda folder: (folder / "valid.int32").touch())
    assert [path.name for path in whole.iterdir()] == ["valid.int32"]


def test_failed_writer_leaves_nothing_that_is_taken_for_the_numbers(texts):
    (texts / "wiki.test.tokens").write_bytes(b"\xff\xfe")
    for _ in range(2):
        with pytest.raises(AppError, match=r"wiki.test.tokens is not valid UTF-8"):
            wikitext(texts)
    assert all(name.endswith(".part") for name in caches(texts))


def test_processes_that_start_at_once_number_the_words_once(texts, tmp_path):
    processes = 3
    fork = multiprocessing.get_context("fork")
    ready = fork.Barrier(processes)

    def slow_encode(*given):
        time.sleep(0.1)
        with open(tmp_path / "made", "a") as file:
            file.write(f"{given[0].name}\n")
        encode(*given)

    def start():
        wikitext_module.encode = slow_encode
        ready.wait()
        data = wikitext(texts)
        (tmp_path / f"length-{os.getpid()}").write_text(str(len(data.train_set.content)))

    running = [fork.Process(target=start) for _ in range(processes)]
    try:
        for process in running:
            process.start()
        for process in running:
            process.join()
            assert process.exitcode == 0
    finally:
        for process in running:
            process.kill()
    assert len((tmp_path / "made").read_text().splitlines()) == 3, "one file of each part"
    assert len({file.read_text() for file in tmp_path.glob("length-*")}) == 1
    assert len(caches(texts)) == 1


def test_vocabulary_of_another_size_names_the_setting(texts):
    with pytest.raises(AppError, match=rf"15 different words, but data.num_classes=9: set data.num_classes={15}"):
        wikitext(texts, num_classes=9)


def test_part_too_short_for_a_sequence_is_refused(texts):
    (texts / "wiki.valid.tokens").write_text("")
    with pytest.raises(AppError, match=r"wiki.valid.tokens has 0 words, which is not enough"):
        wikitext(texts)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [9, 16, 17, 18, 40, 41])
def test_every_token_is_scored_once_over_all_processes(size, processes):
    content = np.arange(100, 100 + size)
    windows = Windows(content, 8, complete=True, multiple=processes)
    assert len(windows) % processes == 0
    scored = []
    for index in range(len(windows)):
        inputs, targets = windows[index]
        assert len(inputs) == len(targets) == 8
        counts = targets != IGNORED
        assert (targets[counts] == inputs[counts] + 1).all()
        scored += targets[counts].tolist()
    assert scored == content[1:].tolist()


def test_training_windows_are_whole(texts):
    windows = Windows(np.arange(20), 8)
    inputs, targets = windows.__getitems__([0, 1])
    assert len(windows) == 2
    assert inputs[:, 0].tolist() == [0, 8]
    assert targets[:, -1].tolist() == [8, 16]
