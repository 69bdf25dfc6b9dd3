"""The glosses: classes large enough, texts clean, no text on both sides."""

from collections import Counter

import pytest

from orthokit.errors import UnknownNameError
from orthokit.lab.glosses import glosses


@pytest.mark.parametrize(("part", "classes", "least"), [("noun", 24, 300), ("verb", 14, 200)])
def test_a_part_has_its_classes_and_no_text_on_both_sides(part: str, classes: int, least: int) -> None:
    found = glosses(part)
    assert len(found.classes) == classes and list(found.classes) == sorted(found.classes)
    sizes = Counter(label for _, label in found.train + found.test)
    assert sorted(sizes) == list(range(classes)) and min(sizes.values()) >= least
    assert {text for text, _ in found.train}.isdisjoint({text for text, _ in found.test})
    assert len(set(found.train + found.test)) == len(found.train) + len(found.test)
    assert 0.09 < len(found.test) / (len(found.train) + len(found.test)) < 0.11
    assert all(text and text == " ".join(text.split()) and '; "' not in text for text, _ in found.train)
    assert glosses(part) is found and part in repr(found)


def test_known_words_have_their_supersense() -> None:
    nouns = glosses("noun")
    labels = {text: nouns.classes[label] for text, label in nouns.train + nouns.test}
    assert labels["a seat for one person, with a support for the back"] == "artifact"
    cat = "feline mammal usually having thick soft fur and no ability to roar: domestic cats; wildcats"
    assert labels[cat] == "animal"


def test_an_unknown_part_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="'noun', 'verb'"):
        glosses("adjective")
