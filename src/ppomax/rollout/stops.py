"""Stop strings: has a reply's text come to contain one?"""

from collections.abc import Sequence

from ppomax.data.template import ChatTemplate


class StopStrings:
    """Decodes the end of a reply and looks for stop strings."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template

    def hit(self, ids: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the last tokens hold one of the strings."""
        if not stop:
            return False
        window = 4 * max(map(len, stop)) + 4  # a token holds a byte at least, a character four
        text = self.template.decode(ids[-window:])
        return any(string in text for string in stop)
