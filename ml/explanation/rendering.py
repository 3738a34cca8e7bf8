"""Explanations for people: as text for a terminal, as Markdown for the UI, as a page with coloured words."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from ml.explanation.explaining import Explanation
from ml.explanation.words import Word

_BAR_WIDTH = 20
_STRONGEST_AT_LEAST = 0.1
"""Bars and colours are relative to the strongest word, but do not magnify what is no effect at all."""
_WORDS_IN_MARKDOWN = 5
_TEXT_SHOWN = 90
_FOR, _AGAINST = "5, 150, 105", "220, 38, 38"
"""Green and red, told apart by the colour-blind by the sign in the tooltip and the line below a word."""

_STYLE = (
    "body{font:15px/1.7 system-ui,sans-serif;color:#334155;max-width:60em;margin:2em auto;padding:0 1em}"
    "mark{color:inherit;border-radius:3px;padding:.1em .2em}mark.against{text-decoration:underline dotted}"
    "table{border-collapse:collapse;margin:.5em 0 2em;line-height:1.4}td,th{padding:.25em .7em;"
    "text-align:left;border-bottom:1px solid #cbd5e1;vertical-align:top}.number{text-align:right}"
    "tr.same td{background:#ecfdf5}h2{font-size:1.1em;margin:2em 0 .3em}section{margin-bottom:4em}"
)


def as_text(explanation: Explanation) -> str:
    """For a terminal: a line per word, with a bar as long as its effect is strong."""
    lines = [
        explanation.text,
        f"category: {explanation.category_path} ({explanation.category_id}), {explanation.confidence:.1%}",
        *(
            f"     not: {other.category_path} ({other.category_id}), {other.confidence:.1%}"
            for other in explanation.alternatives
        ),
        "",
        "words: change of the category's log-odds by each (+ speaks for it)",
    ]
    width = max((len(word.word) for word in explanation.words), default=0)
    strongest = _strongest(explanation.words)
    for word in explanation.words:
        bar = ("+" if word.effect >= 0 else "-") * round(_BAR_WIDTH * abs(word.effect) / strongest)
        lines.append(f"  {word.word:<{width}}  {word.effect:+7.3f}  {bar}".rstrip())
    if explanation.fast_words:
        lines += ["", "the fast model's margin, word by word"]
        lines += [f"  {name}  {margin:+.3f}" for name, margin in explanation.fast_words]
    lines += ["", _similar_headline(explanation)]
    for offer in explanation.similar:
        sign = "=" if offer.category_id == explanation.category_id else " "
        lines.append(f"  {offer.similarity:.3f} {sign} {offer.category_path}")
        lines.append(f"          {offer.shop_id}, {offer.offer_id}: {_cut(offer.text)}")
    return "\n".join(lines)


def as_markdown(explanation: Explanation, *, true_path: str | None = None) -> str:
    """For the UI: the strongest words in bold in their text, and the similar offers as a table.

    Args:
        explanation: Of one offer.
        true_path: The right category, where the explained one is a mistake.
    """
    strongest = sorted(explanation.words, key=lambda word: -word.effect)[:_WORDS_IN_MARKDOWN]
    places = {word.start for word in strongest if word.effect > 0}
    text = _marked(
        explanation,
        lambda word: f"**{_plain(word.word)}**" if word.start in places else _plain(word.word),
        _plain,
    )
    is_wrong = "" if true_path is None else f", labelled **{_plain(true_path)}**"
    told = ", ".join(f"{_plain(word.word)} {word.effect:+.2f}" for word in strongest)
    rows = [
        f"| {offer.similarity:.2f} | {_plain(offer.category_path)} | {_plain(_cut(offer.text))} |"
        for offer in explanation.similar
    ]
    return "\n".join(
        [
            text,
            "",
            f"taken for **{_plain(explanation.category_path)}** ({explanation.confidence:.0%}){is_wrong}; "
            f"by {told}",
            "",
            "| similarity | labelled | offer |",
            "|---|---|---|",
            *rows,
        ]
    )


def as_page(explanations: Sequence[Explanation], true_paths: Sequence[str] = ()) -> str:
    """One HTML page, complete in itself: each offer's text with coloured words, and its similar offers.

    Args:
        explanations: In the order of the page.
        true_paths: The right category of each, where the explained ones are mistakes.
    """
    wrong: Sequence[str | None] = true_paths or [None] * len(explanations)
    sections = "\n".join(map(_section, explanations, wrong))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>Why this category</title>"
        f"<style>{_STYLE}</style></head><body>\n{sections}\n</body></html>\n"
    )


def _section(explanation: Explanation, true_path: str | None) -> str:
    strongest = _strongest(explanation.words)

    def coloured(word: Word) -> str:
        colour, side = (_FOR, "for") if word.effect >= 0 else (_AGAINST, "against")
        strength = 0.75 * min(1.0, abs(word.effect) / strongest)
        return (
            f"<mark class='{side}' style='background:rgba({colour},{strength:.2f})' "
            f"title='{word.effect:+.3f}'>{html.escape(word.word)}</mark>"
        )

    others = "; ".join(
        f"{html.escape(other.category_path)} {other.confidence:.1%}" for other in explanation.alternatives
    )
    rows = "\n".join(
        f"<tr{same}><td class='number'>{offer.similarity:.3f}</td><td>{html.escape(offer.category_path)}</td>"
        f"<td>{html.escape(offer.text)}</td><td>{html.escape(offer.shop_id)}</td>"
        f"<td>{html.escape(offer.offer_id)}</td></tr>"
        for offer in explanation.similar
        for same in [" class='same'" if offer.category_id == explanation.category_id else ""]
    )
    return (
        f"<section><p>{_marked(explanation, coloured, html.escape)}</p>\n"
        f"<p><b>{html.escape(explanation.category_path)}</b> {explanation.confidence:.1%}"
        f"{'' if true_path is None else f', labelled <b>{html.escape(true_path)}</b>'}"
        f"{'; next: ' + others if others else ''}<br>model {html.escape(explanation.model_version)}; green "
        "words speak for the category, red underlined ones against it: the stronger, the more its "
        f"log-odds change without them</p>\n<h2>{html.escape(_similar_headline(explanation))}</h2>\n"
        "<table><tr><th>similarity</th><th>labelled</th><th>offer</th><th>shop</th><th>id</th></tr>\n"
        f"{rows}</table></section>"
    )


def _marked(explanation: Explanation, mark: Callable[[Word], str], plain: Callable[[str], str]) -> str:
    """The text with every word marked, and what is between them as ``plain`` makes it."""
    pieces, done = list[str](), 0
    for word in explanation.words:
        pieces += [plain(explanation.text[done : word.start]), mark(word)]
        done = word.start + len(word.word)
    return "".join([*pieces, plain(explanation.text[done:])])


def _similar_headline(explanation: Explanation) -> str:
    return f"similar labelled offers: {explanation.agreeing} of {len(explanation.similar)} have this category"


def _strongest(words: Sequence[Word]) -> float:
    return max([_STRONGEST_AT_LEAST, *(abs(word.effect) for word in words)])


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_SHOWN else text[: _TEXT_SHOWN - 1] + "…"


def _plain(text: str) -> str:
    """Text in which Markdown finds nothing to format."""
    for character in "\\`*_{}[]<>#|~":
        text = text.replace(character, "\\" + character)
    return text
