"""Reading only the start of a text changes no token."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tokenizers import Tokenizer, models, pre_tokenizers

from ml.learning.encoder_files import PACKAGED_ENCODER, encoder_folder
from ml.learning.pretrained import load_tokenizer
from ml.serving.first_tokens import first_tokens, takes_words_apart
from tests.ml.tiny_tokenizers import LETTERS, WORDS, unigram, word_piece


def packaged() -> Tokenizer:
    with encoder_folder(PACKAGED_ENCODER) as folder:
        return load_tokenizer(folder)[0]


TOKENIZERS = {"packaged": packaged(), "WordPiece": word_piece(), "Unigram": unigram()}

words = st.one_of(
    st.sampled_from([*WORDS, *LETTERS, "", "Ünüsual", "ΟΔΟΣ", "日本", "1.7", "a/b|c", "x" * 120]),
    st.text(max_size=8),
    # Words that give no token at all: controls, a replacement character, marks without a letter.
    st.sampled_from(["\ufffd", "\u200b", "\x00", "\u0301", "\u00a0", "\t"]),
)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.lists(st.lists(words, max_size=40).map(" ".join), max_size=6), st.integers(3, 24))
def test_they_are_those_of_the_whole_text(kind: str, texts: list[str], count: int) -> None:
    tokenizer = TOKENIZERS[kind]
    tokenizer.no_padding()
    tokenizer.enable_truncation(count)
    assert takes_words_apart(tokenizer)
    whole = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
    assert first_tokens(tokenizer, texts, count) == whole


def test_of_a_long_text_only_the_start_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    class Reader:
        def encode_batch_fast(self, texts):
            read.extend(texts)
            return tokenizer.encode_batch_fast(texts)

    tokenizer = TOKENIZERS["WordPiece"]
    tokenizer.no_padding()
    tokenizer.enable_truncation(8)
    silent = " ".join(["\ufffd"] * 8 + ["kettle"] * 8)
    assert len(first_tokens(Reader(), ["steel kettle " * 50, silent], 8)) == 2
    assert read == ["steel kettle steel kettle steel kettle steel kettle", " ".join(["\ufffd"] * 8), silent]


@pytest.mark.parametrize(
    ("pre_tokenizer", "apart"),
    [
        (None, False),
        (pre_tokenizers.Whitespace(), True),
        (pre_tokenizers.Punctuation(), False),
        (pre_tokenizers.Metaspace(split=False), False),
        (pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]), True),
        (pre_tokenizers.Sequence([pre_tokenizers.Punctuation()]), False),
    ],
)
def test_tokens_that_may_span_words_are_not_taken_for_apart(pre_tokenizer, apart: bool) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    assert takes_words_apart(tokenizer) is apart
