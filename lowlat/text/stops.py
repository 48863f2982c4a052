"""Stop strings in streamed text. Token ids that end a generation are the engine's."""

from collections.abc import Sequence

from lowlat.utils.errors import UserError


class StopStrings:
    """Passes text on until a stop string is complete; holds back a possible beginning of one.

    The stop string that is complete first wins; of several that end at the same character, the
    longest. So the result does not depend on the cuts of the text. The stop string and everything
    after it are dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises UserError for an empty stop string."""
        if any(not stop for stop in stops):
            raise UserError(
                "stop: an empty stop string would stop before the first character; remove it"
            )
        # Longest first, so that among matches with the same end the first one found is the longest.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is final, and whether a stop string was found (now or before)."""
        if self.matched is not None:
            return "", True
        text = self._held + text
        found = [(text.index(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if found:
            end, self.matched = min(found, key=lambda match: match[0])
            self._held = ""
            return text[: end - len(self.matched)], True
        end = len(text) - self._beginning(text)
        self._held = text[end:]
        return text[:end], False

    def flush(self) -> str:
        """The text held back; called when no more text follows."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = len(self._stops[0]) - 1 if self._stops else 0
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                return size
        return 0
