"""DreamBooth's file ``prompts_and_classes.txt``: a class word per subject, two lists of prompts.

Its two parts are a table "subject_name,class" under the heading Classes, and under Prompts the
lists "Object Prompts" and "Live Subject Prompts", each a Python list whose items read
``'a {0} {1} in the snow'.format(unique_token, class_token),``. The official lists have 25 prompts
each: for objects 20 scenes and 5 properties, for live subjects 10 scenes, 10 outfits and 5
properties.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter

from snella.errors import UserError, unknown

NAME = "prompts_and_classes.txt"
LIVE = frozenset({"cat", "dog"})
"""Class words of the official subjects that get the prompts of live subjects."""
_PROMPT = re.compile(
    r"""^(?P<text>(?P<quote>['"]).+(?P=quote))\.format\(\s*unique_token\s*,\s*class_token\s*\),?$"""
)
_HEADINGS = ("Classes", "Prompts", "Object Prompts", "Live Subject Prompts")


@dataclass
class PromptFile:
    """A parsed file; a template's {0} is the rare token and {1} the class word."""

    path: Path
    classes: dict[str, str] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)
    live: list[str] = field(default_factory=list)

    def class_word(self, subject: str) -> str:
        """The class word of ``subject``; raises :class:`~snella.errors.UserError` without one."""
        if subject not in self.classes:
            raise unknown(f"subject in {self.path}:", subject, self.classes)
        return self.classes[subject]

    def templates(self, class_word: str) -> list[str]:
        """The prompts of subjects of a class: those of live subjects for cats and dogs."""
        return self.live if class_word.casefold() in LIVE else self.objects


def read_prompts(path: Path) -> PromptFile:
    """Parse the official layout.

    Raises :class:`~snella.errors.UserError` that names file and line of what does not fit.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise UserError(f"Cannot read the prompt file {path}: {reason}.") from error
    found, heading = PromptFile(path), ""
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text in _HEADINGS:
            heading = text
        elif text and text not in ("subject_name,class", "prompt_list = [", "]"):
            _line(found, heading, text, f"{path}, line {number}")
    for part, value in (
        ("subject under Classes", found.classes),
        ("prompt under Object Prompts", found.objects),
        ("prompt under Live Subject Prompts", found.live),
    ):
        if not value:
            raise UserError(
                f"{path} has no {part}; it must have the layout of DreamBooth's {NAME} "
                "(docs/generation.md)."
            )
    return found


def _line(found: PromptFile, heading: str, text: str, place: str) -> None:
    if heading == "Classes":
        subject, comma, word = (part.strip() for part in text.partition(","))
        if not comma or not subject or not word or "," in word:
            raise UserError(f"{place}: expected `subject_name,class`, found {text!r}.")
        if subject in found.classes:
            raise UserError(f"{place}: the subject {subject!r} is listed twice.")
        found.classes[subject] = word
        return
    match = _PROMPT.match(text)
    if heading not in _HEADINGS[2:] or match is None:
        raise UserError(
            f"{place}: expected a heading or \"'a {{0}} {{1}} ...'.format(unique_token, "
            f'class_token),", found {text!r}.'
        )
    try:
        template = str(ast.literal_eval(match["text"]))
    except (SyntaxError, ValueError):
        raise UserError(f"{place}: {match['text']} is no text in Python's quotes.") from None
    check_template(template, place)
    part = found.objects if heading == "Object Prompts" else found.live
    if template in part:  # both would get the same noise, and so the same images
        raise UserError(f"{place}: the prompt {template!r} is listed twice under {heading}.")
    part.append(template)


def check_template(template: str, place: str) -> None:
    """Raise :class:`~snella.errors.UserError` unless {0} and {1} occur, and nothing else in {}."""
    try:
        found = {part[1:] for part in Formatter().parse(template) if part[1] is not None}
    except ValueError:  # a brace alone
        found = set()
    if found != {("0", "", None), ("1", "", None)}:
        raise UserError(
            f"{place}: the prompt {template!r} must contain {{0}} (the rare token) and {{1}} (the "
            "class word), and no other braces; write {{ and }} for braces of its own."
        )


def fill_prompt(template: str, token: str, class_word: str) -> str:
    """A prompt with rare token and class word; an empty token leaves no double space."""
    return " ".join(template.format(token, class_word).split())
