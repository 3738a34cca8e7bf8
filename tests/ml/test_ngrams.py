from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.serving.key_table import KeyTable
from ml.serving.ngrams import Vocabulary, ngram_keys, ngrams_of, read_words

TEXTS = st.lists(st.text(alphabet=st.characters(codec="utf-8"), max_size=60), max_size=8)


def words_of(text: str) -> list[str]:
    return read_words([text]).strings()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Kettle-Spout 500ML | 1,5l", ["kettle", "spout", "500ml", "1", "5l"]),
        ("Überspülmaschinen STRASSE", ["überspülmaschinen", "strasse"]),
        ("snake_case 4x6cm", ["snake", "case", "4x6cm"]),
        ("有機 緑茶ティー", ["有", "機", "緑", "茶", "ティー"]),
        ("चाय की केतली", ["चाय", "की", "केतली"]),
        ("กาน้ำชา", ["กาน้ำชา"]),
        ("\U00020000\U00020001 ΌΔΟΣ", ["\U00020000", "\U00020001", "όδοσ"]),
        ("–™\ufffd…", []),
        ("", []),
    ],
)
def test_words_of_any_alphabet(text, words):
    assert words_of(text) == words


@given(TEXTS)
def test_texts_are_read_alike_beside_others(texts):
    together = read_words(texts)
    for number, text in enumerate(texts):
        alone, here = read_words([text]), together.texts == number
        assert together.chosen(here).strings() == alone.strings()
        np.testing.assert_array_equal(together.keys[here], alone.keys)
        np.testing.assert_array_equal(together.is_title[here], alone.is_title)


@given(TEXTS)
def test_equal_words_have_equal_keys_and_different_ones_do_not(texts):
    words = read_words(texts)
    assert len(set(words.strings())) == len(set(zip(words.strings(), words.keys.tolist(), strict=True)))
    assert len(set(words.strings())) == len(set(words.keys.tolist()))
    assert not len(words) or (words.keys.min() > 0 and words.keys.max() < 2**54)


@given(TEXTS)
def test_ngrams_of_many_words_at_once_are_those_of_each(texts):
    words = read_words(texts)
    keys, places = words.ngrams()
    for number, word in enumerate(words.strings()):
        assert set(keys[places == number].tolist()) == set(ngram_keys(ngrams_of(word)).tolist())


def test_the_title_ends_at_the_first_bar():
    words = read_words(["red kettle | Acme | kitchen", "no bar"])
    assert words.is_title.tolist() == [True, True, False, False, True, True]


def test_ngrams_are_distinct_and_end_with_the_word():
    assert ngrams_of("aaa") == [" aa", "aaa", "aa ", " aaa", "aaa ", " aaa "]
    assert ngrams_of("a") == [" a "]


def test_a_vocabulary_finds_words_pairs_and_ngrams():
    known = Vocabulary(["tea", "pot"], [("tea", "pot")], [" te", "pot", "zzz"])
    words = read_words(["Tea pot tea", "pot tea-pot"])
    tea, pot = [1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0]
    np.testing.assert_array_equal(known.of_words(words).toarray(), [tea, pot, tea, pot, tea, pot])
    features, places = known.of_pairs(words)
    assert (features.tolist(), places.tolist()) == ([2, 2], [0, 4])


@pytest.mark.parametrize("words", [["two words"], [""], ["Upper", "upper"], ["same", "same"]])
def test_a_vocabulary_of_other_than_words_is_refused(words):
    with pytest.raises(ValueError, match="of the vocabulary"):
        Vocabulary(words, [], [])


def test_an_empty_vocabulary_knows_nothing():
    known, words = Vocabulary([], [], []), read_words(["tea pot"])
    assert known.of_words(words).shape == (2, 0)
    assert len(known.of_pairs(words)[0]) == 0


@given(st.sets(st.integers(1, 2**54 - 1), max_size=300), st.sets(st.integers(1, 2**54 - 1), max_size=50))
def test_a_key_table_is_a_dictionary(there, asked):
    table = KeyTable(len(there))
    expected = {key: number for number, key in enumerate(sorted(there))}
    keys = np.array(sorted(there), dtype=np.int64)
    half = len(keys) // 2
    table.insert(keys[half:], np.arange(half, len(keys)))
    table.insert(keys[:half], np.arange(half))
    questions = np.array([*there, *asked], dtype=np.int64)
    assert table.find(questions).tolist() == [expected.get(key, -1) for key in questions.tolist()]


def test_a_key_table_takes_keys_that_begin_at_one_slot():
    table = KeyTable(64)
    spread = 0x9E3779B97F4A7C15
    inverse = pow(spread, -1, 2**64)
    keys = np.array([(inverse * number) % 2**64 for number in range(1, 65)], dtype=np.uint64).view(np.int64)
    table.insert(keys, np.arange(64))
    assert table.find(keys).tolist() == list(range(64))
