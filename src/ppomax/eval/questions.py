"""Questions with a known answer: how files hold them, and how a model is asked.

A row is {question, choices, answer} (answer: place from 0, or its letter) or {question, answer}
with a text, or several in `answers`, for free answers; `subject`, `lang` and `id` where known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ppomax.data.raw import BadRow, iter_raw
from ppomax.errors import DataError
from ppomax.eval.rubrics import Language, language_of
from ppomax.types import Message

LETTERS = "ABCDEFGHIJ"
Form = Literal["letter", "text"]


@dataclass(frozen=True, slots=True)
class Question:
    """One question."""

    id: str
    question: str
    choices: tuple[str, ...]
    """Empty for a free answer."""
    answer: int
    """Place of the right choice; -1 for a free answer."""
    texts: tuple[str, ...]
    """What counts as a right free answer."""
    subject: str
    group: str
    """File and subject: what accuracy is given by."""
    language: Language
    where: str


def load_questions(path: str, group: str, limit: int | None = None) -> list[Question]:
    """The questions of a file, in order.

    Args:
        group: the file's name in tables; a subject is added to it.

    Raises:
        DataError: unreadable, empty, an id twice, or a row that is no question.
    """
    found: dict[str, Question] = {}
    for number, raw in iter_raw(path):
        if limit is not None and len(found) == limit:
            break
        where = f"{path}:{number}"
        if isinstance(raw, BadRow):
            raise DataError(f"{where}: {raw.reason}")
        if not isinstance(raw, dict):
            raise DataError(f"{where}: a row with question and answer is wanted")
        row = _question(raw, where, group)
        if row.id in found:
            raise DataError(f"{where}: id {row.id} stands twice ({found[row.id].where})")
        found[row.id] = row
    if not found:
        raise DataError(f"{path}: no questions")
    return list(found.values())


def _question(raw: dict[str, Any], where: str, group: str) -> Question:
    text, choices = raw.get("question"), raw.get("choices") or []
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: question: text is wanted, found {text!r:.60}")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise DataError(f"{where}: choices: a list of texts is wanted, found {choices!r:.60}")
    if len(choices) == 1 or len(choices) > len(LETTERS):
        raise DataError(f"{where}: choices: 2 to {len(LETTERS)} are wanted, found {len(choices)}")
    subject = str(raw.get("subject") or "")
    return Question(
        id=str(raw.get("id") or where),
        question=text,
        choices=tuple(choices),
        answer=_place(raw.get("answer"), len(choices), where) if choices else -1,
        texts=() if choices else _texts(raw, where),
        subject=subject,
        group=f"{group}/{subject}" if subject else group,
        language=language_of(str(raw.get("lang") or ""), [Message(role="user", content=text)]),
        where=where,
    )


def _place(answer: object, count: int, where: str) -> int:
    if isinstance(answer, str) and len(answer) == 1 and answer.upper() in LETTERS[:count]:
        return LETTERS.index(answer.upper())
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < count:
        return answer
    raise DataError(
        f"{where}: answer: a place from 0 to {count - 1} or its letter is wanted, found {answer!r}"
    )


def _texts(raw: dict[str, Any], where: str) -> tuple[str, ...]:
    listed = raw.get("answers", raw.get("answer"))
    texts = listed if isinstance(listed, list) else [listed]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"{where}: answer: text, or a list of texts in answers, is wanted")
    return tuple(texts)


def context(question: Question, shots: Sequence[Question], form: Form) -> str:
    """What stands before the answer: examples with theirs, then the question.

    The letter form is that of Hendrycks et al. 2021 (2009.03300) and, in Chinese, of CMMLU (Li et
    al. 2023, 2306.09212): choices with letters, the answer a letter. The text form shows no
    choices: each is read as the answer.
    """
    parts = [_ask(shot, form) + answer_text(shot, form) for shot in shots]
    return _heading(question, form) + "\n\n".join([*parts, _ask(question, form)])


def answer_text(question: Question, form: Form, choice: int | None = None) -> str:
    """The continuation that answers: ` B` or ` the text`; without the space in Chinese."""
    place = question.answer if choice is None else choice
    if not question.choices:
        text = question.texts[0]
    else:
        text = LETTERS[place] if form == "letter" else question.choices[place]
    return text if question.language == "zh" else f" {text}"


def _heading(question: Question, form: Form) -> str:
    if form == "text" or not question.choices:
        return ""
    subject = question.subject.replace("_", " ")
    if question.language == "zh":
        about = f"关于{subject}的" if subject else ""
        return f"以下是{about}单项选择题，请直接给出正确答案的选项。\n\n"
    about = f" about {subject}" if subject else ""
    return f"The following are multiple choice questions (with answers){about}.\n\n"


def _ask(question: Question, form: Form) -> str:
    zh = question.language == "zh"
    if form == "text" or not question.choices:
        text = question.question
        return f"问题：{text}\n答案：" if zh else f"Question: {text}\nAnswer:"
    lines = [f"{LETTERS[i]}. {choice}" for i, choice in enumerate(question.choices)]
    head = f"题目：{question.question}" if zh else question.question
    return "\n".join([head, *lines, "答案是：" if zh else "Answer:"])


def shots_for(question: Question, examples: Sequence[Question], count: int) -> list[Question]:
    """The first `count` examples of the question's subject (else of all), itself left out.

    Raises:
        DataError: there are fewer.
    """
    if count == 0:
        return []
    same = [
        e for e in examples if e.subject == question.subject and e.language == question.language
    ]
    same = [e for e in same or examples if e.question != question.question]
    same = [e for e in same if bool(e.choices) == bool(question.choices)]
    if len(same) < count:
        raise DataError(
            f"{question.where}: {count} examples are wanted, there are {len(same)} for subject "
            f"{question.subject!r}; give fewer --shots or more --fewshot rows"
        )
    return same[:count]
