"""Hidden characters made visible, for pages and terminals alike.

Prompts and replies are other people's text. Escaping of HTML is the template engine's; here is
what escaping leaves: terminal escapes, direction marks, invisible and invalid characters.
"""

import re
import unicodedata

JOINERS = "\u200c\u200d"
"""Zero-width (non-)joiners: Persian, Indic scripts and emoji are spelled with them."""
SUSPECT = re.compile(r"[^\n\t -~\xa1-\xac\xae-\u036f\u3001-\u9fff\uac00-\ud7a3]")
"""Characters worth a look; the common ranges are passed over for speed."""
HIDDEN = {"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"}
"""Unicode categories without a shape of their own."""


def visible(text: str) -> str:
    """The text with control, direction, invisible and invalid characters spelled out.

    Newline, tab and the joiners stay. C0 controls become their pictures (ESC is ␛), the rest
    ⟨U+202E⟩ and the like. The result can always be encoded as UTF-8.
    """
    return SUSPECT.sub(lambda match: _spelled(match.group()), text)


def _spelled(char: str) -> str:
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if char not in JOINERS and unicodedata.category(char) in HIDDEN:
        return f"⟨U+{code:04X}⟩"
    return char
