"""The rubrics a judge is given: one text per question and language, which a user may replace."""

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ppomax.errors import ConfigError
from ppomax.eval.pairs import QUESTIONS, Question
from ppomax.types import Message

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True, slots=True)
class Rubrics:
    """Texts by (question, language)."""

    texts: dict[tuple[Question, Language], str]

    def text(self, question: Question, language: Language) -> str:
        """The rubric of a question in a language."""
        return self.texts[question, language]


def load_rubrics(folder: Path | None = None) -> Rubrics:
    """The shipped rubrics; those of `folder` (named as the shipped files) replace their namesakes.

    Raises:
        ConfigError: no such folder, none of the names in it, another `.md` file, or an empty one.
    """
    names = {f"{q}.{lang}.md": (q, lang) for q in QUESTIONS for lang in LANGUAGES}
    shipped = importlib.resources.files("ppomax.eval") / "rubrics"
    texts = {key: (shipped / name).read_text(encoding="utf-8") for name, key in names.items()}
    if folder is None:
        return Rubrics(texts)
    if not folder.is_dir():
        raise ConfigError(f"rubrics: {folder} is no folder; give one with {', '.join(names)}")
    found = {path.name: path for path in sorted(folder.glob("*.md"))}
    unknown = sorted(set(found) - set(names))
    if unknown or not found:
        problem = f"{unknown[0]} is not a rubric's name" if unknown else "no rubric in it"
        raise ConfigError(f"rubrics {folder}: {problem}; the names are {', '.join(names)}")
    for name, path in found.items():
        texts[names[name]] = _read(path)
    return Rubrics(texts)


def language_of(lang: str, messages: Sequence[Message]) -> Language:
    """Chinese where the prompt says so, or says nothing and its last turn has Chinese characters.

    Rubrics exist in two languages; prompts in any other are judged by the English one.
    """
    if lang:
        return "zh" if lang.lower().startswith(("zh", "chinese", "cn")) else "en"
    text = messages[-1]["content"] if messages else ""
    return "zh" if any("一" <= char <= "鿿" for char in text) else "en"


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"rubric {path}: cannot be read ({error})") from None
    if not text.strip():
        raise ConfigError(f"rubric {path}: is empty")
    return text
