"""How a reward model reads a dialogue: its own template, and the token its score is read at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from ppomax.data.template import FALLBACK_TEMPLATE, ChatTemplate, Encoded
from ppomax.errors import ConfigError
from ppomax.models.ensembles import members
from ppomax.models.export import REWARD_CARD_FILE
from ppomax.models.load import load_tokenizer
from ppomax.models.names import resolve
from ppomax.types import Message, Messages


@dataclass(frozen=True, slots=True)
class Reading:
    """How a reward model with a tokenizer of its own reads a dialogue."""

    template: ChatTemplate
    own_form: bool
    """A model of ppomax: the dialogue ends with the end-of-turn token, where the score is read.
    Else it goes on as the template writes it."""
    pad: int | None = None
    """Its sequence classification reads the last id that is not this."""
    positions: int | None = None
    """The most tokens it reads."""

    def ids(self, prompt: Messages, answer: str) -> list[int]:
        """Token ids of an answered prompt, up to the one at which the score is read."""
        if self.own_form:
            return self.template.prompt(prompt) + self.template.answer(answer)
        ids = self.template.whole((*prompt, Message(role="assistant", content=answer)))
        while len(ids) > 1 and ids[-1] == self.pad:
            ids = ids[:-1]
        return ids

    def encode(
        self, prompt: Messages, answers: Sequence[str], max_length: int
    ) -> list[Encoded] | None:
        """Every answer behind the same prompt, older turns dropped until the longest fits.

        None if the last turn alone is too long.
        """
        start = len(self.template.prompt(prompt))
        longest = max(len(self.ids(prompt, answer)) for answer in answers) - start
        fitted = self.template.fit(prompt, max_length - longest)
        if fitted is None:
            return None
        sides = []
        for answer in answers:
            ids = self.ids(fitted[0], answer)
            written = min(len(self.template.answer(answer)), len(ids))
            sides.append(Encoded(ids, [False] * (len(ids) - written) + [True] * written))
        return sides if max(len(side.ids) for side in sides) <= max_length else None


def load_reading(
    name: str, system: str | None, where: str, *, trust_remote_code: bool = False
) -> Reading:
    """The reading of a reward model, or of an ensemble, whose members have one.

    Args:
        system: prompt before every dialogue that has none.
        where: what named the model, for errors.

    Raises:
        ModelError: no such model.
        ConfigError: a model of another trainer without a chat template.
    """
    place = resolve(name)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    own_form = (Path(place) / REWARD_CARD_FILE).is_file()
    if not own_form and str(tokenizer.chat_template).endswith(FALLBACK_TEMPLATE):
        raise ConfigError(
            f"{where}: {name} ships no chat template to write replies in; put its "
            "chat_template.jinja into the folder"
        )
    # what its own classification takes for padding; loading gave the model an id that ends no text
    found = AutoConfig.from_pretrained(
        members(place)[0], trust_remote_code=trust_remote_code
    ).get_text_config()
    positions = getattr(found, "max_position_embeddings", None)
    return Reading(ChatTemplate(tokenizer, system), own_form, found.pad_token_id, positions)
