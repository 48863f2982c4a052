"""Sequences that take, share, fill, publish and give back pages at random, checked step by step.

Owns the plain model that `PageAllocator` and `PrefixCache` are compared with: dicts and lists
searched from end to end. It stands in for a model's rows with numbers that differ wherever
cache_namespace, form or any token up to there differ, so a page that is found for the wrong
sequence is seen at once.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

from lowlat.engine.page_allocator import PageAllocator
from lowlat.engine.prefix import Digest, PrefixCache

PAGE_SIZE = 3
SALTS = (b"", b"one", b"two")
FORMS = ("decode", "expanded")
MAX_TOKENS = 24
MAX_PAGES = 24
MAX_SEQUENCES = 8


@dataclass
class Text:
    """What a sequence's rows depend on; its page i is computed by forms[i]."""

    cache_namespace: bytes
    tokens: list[int]
    forms: list[str]


@dataclass
class Held:
    """A sequence that is running."""

    text: Text
    pages: list[int]
    num_rows: int
    """Leading tokens whose rows are computed."""
    rows: list[int] = field(default_factory=list)
    """What the row of each token must be."""


class Model:
    """The allocator and the index as plainly as can be."""

    def __init__(self, num_pages: int) -> None:
        self.counts = [0] * num_pages
        self.known: dict[int, int] = {}
        """Last row of a page -> page."""
        self.before: dict[int, int | None] = {}
        """Last row of a known page -> last row of the page before it."""
        self.stamps: dict[int, int] = {}
        """Cached page -> when it was let go."""
        self.clock = 0

    def row_of(self, page: int) -> int | None:
        return next((row for row, known in self.known.items() if known == page), None)

    def free(self) -> list[int]:
        cached = self.stamps
        return [p for p, count in enumerate(self.counts) if count == 0 and p not in cached]

    def take(self, count: int) -> list[int]:
        pages = self.free()[:count]
        evicted = [self.evict() for _ in range(count - len(pages))]
        pages += sorted(evicted)
        for page in pages:
            self.counts[page] = 1
        return pages

    def evict(self) -> int:
        """The page let go longest ago of those that no known page follows."""
        parents = set(self.before.values())
        leaves = [page for page in self.stamps if self.row_of(page) not in parents]
        page = min(leaves, key=self.stamps.__getitem__)
        row = self.row_of(page)
        assert row is not None
        del self.stamps[page], self.known[row], self.before[row]
        return page

    def retain(self, pages: list[int]) -> None:
        for page in pages:
            self.counts[page] += 1
            self.stamps.pop(page, None)

    def release(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self.counts[page] -= 1
            if self.counts[page] == 0 and page in self.known.values():
                self.clock += 1
                self.stamps[page] = self.clock

    def match(self, rows: list[int]) -> list[int]:
        """`rows` has the last row of each page asked for."""
        pages: list[int] = []
        for row in rows:
            if row not in self.known:
                break
            pages.append(self.known[row])
        self.retain(pages)
        return pages

    def insert(self, rows: list[int], pages: list[int]) -> list[int]:
        """The pages the sequence has afterwards."""
        pages = list(pages)
        for i, row in enumerate(rows):
            if self.known.get(row) == pages[i]:
                continue
            if self.counts[pages[i]] > 1:
                break
            if row in self.known:
                self.retain([self.known[row]])
                self.release([pages[i]])
                pages[i] = self.known[row]
            else:
                self.known[row] = pages[i]
                self.before[row] = rows[i - 1] if i > 0 else None
        return pages


class Driver:
    """`run` makes random steps from one seed. With a `digest` that collides, the comparison is left
    out (which pages stay unknown is then chance), and what is found must be right all the same."""

    def __init__(self, seed: int, *, num_pages: int = 17, digest: Digest | None = None) -> None:
        self.random = random.Random(seed)
        self.allocator = PageAllocator(num_pages)
        self.cache = PrefixCache(self.allocator, page_size=PAGE_SIZE, digest=digest)
        self.model = None if digest else Model(num_pages)
        self.sequences: list[Held] = []
        self.done = Counter[str]()
        """How often each thing happened."""
        self._texts: list[Text] = []
        self._row_numbers: dict[tuple[object, ...], int] = {}
        self._stored: dict[int, list[int]] = {}
        """Page -> the rows written into it."""

    def run(self, num_steps: int, *, check_every: int = 1) -> None:
        steps = {
            self.admit: 4,
            self.extend: 10,
            self.fork: 2,
            self.publish: 3,
            self.shorten: 1,
            self.finish: 3,
            self.grow: 0.02,
            self.clear: 0.02,
        }
        chosen = self.random.choices(list(steps), list(steps.values()), k=num_steps)
        for number, step in enumerate(chosen):
            step()
            if number % check_every == 0:
                self.check()
        self.check()

    def check(self) -> None:
        self.cache.check_integrity([sequence.pages for sequence in self.sequences])
        allocator, model = self.allocator, self.model
        assert allocator.num_free + allocator.num_cached + allocator.num_used == allocator.num_pages
        for sequence in self.sequences:
            self._check_rows(sequence)
        if model is not None:
            assert model.counts == [
                allocator.num_holders(page) for page in range(allocator.num_pages)
            ]
            assert sorted(model.stamps, key=model.stamps.__getitem__) == allocator.eviction_order()
            assert len(model.free()) == allocator.num_free
            assert len(model.known) == len(self.cache)

    def admit(self) -> None:
        """A sequence that begins as an earlier one did, or not."""
        if len(self.sequences) == MAX_SEQUENCES:
            return self.finish()
        text = self._new_text()
        held = Held(text, [], 0, self._rows(text))
        asked = len(text.tokens) // PAGE_SIZE
        held.pages = self.cache.match(text.cache_namespace, text.tokens, text.forms[:asked])
        if self.model is not None:
            assert held.pages == self.model.match(held.rows[PAGE_SIZE - 1 :: PAGE_SIZE][:asked])
        held.num_rows = PAGE_SIZE * len(held.pages)
        self._check_rows(held)
        self.sequences.append(held)
        self.done["hit pages"] += len(held.pages)
        return None

    def extend(self) -> None:
        """Compute more rows of a sequence, inventing tokens where it has none left."""
        held = self._any()
        if held is None or held.num_rows == MAX_TOKENS:
            return
        end = min(held.num_rows + self.random.randint(1, 7), MAX_TOKENS)
        if not self._reserve(held, end):
            return
        while len(held.text.tokens) < end:
            self._append(held.text)
        held.rows = self._rows(held.text)
        for position in range(held.num_rows, end):
            page = held.pages[position // PAGE_SIZE]
            assert not self.allocator.is_shared(page) and not self.allocator.is_kept(page)
            written = self._stored.setdefault(page, [])
            del written[position % PAGE_SIZE :]
            written.append(held.rows[position])
        held.num_rows = end
        if self.random.random() < 0.7:
            self._publish(held)

    def fork(self) -> None:
        """A second sequence goes on after the same rows, with pages of its own from there."""
        held = self._any()
        if held is None or len(self.sequences) == MAX_SEQUENCES:
            return
        if self.random.random() < 0.5:
            self._publish(held)
        num_full = held.num_rows // PAGE_SIZE
        shared = held.pages[:num_full]
        self.allocator.retain(shared)
        if self.model is not None:
            self.model.retain(shared)
        text = Text(
            held.text.cache_namespace,
            held.text.tokens[: num_full * PAGE_SIZE],
            held.text.forms[:num_full],
        )
        rows = held.rows[: num_full * PAGE_SIZE]
        self.sequences.append(Held(text, shared, num_full * PAGE_SIZE, rows))
        self.done["forks"] += 1

    def publish(self) -> None:
        held = self._any()
        if held is not None:
            self._publish(held)

    def shorten(self) -> None:
        """Take the last pages of a sequence back."""
        held = self._any()
        if held is None:
            return
        num_left = self.random.randint(0, held.num_rows // PAGE_SIZE)
        self._release(held.pages[num_left:])
        del held.pages[num_left:]
        held.num_rows = num_left * PAGE_SIZE
        held.text = Text(
            held.text.cache_namespace, held.text.tokens[: held.num_rows], held.text.forms[:num_left]
        )
        held.rows = held.rows[: held.num_rows]

    def finish(self) -> None:
        held = self._any()
        if held is not None:
            self.sequences.remove(held)
            self._release(held.pages)
            self._remember(held.text)

    def grow(self) -> None:
        total = min(self.allocator.num_pages + self.random.randint(0, 4), MAX_PAGES)
        self.allocator.grow(total)
        if self.model is not None:
            self.model.counts += [0] * (total - len(self.model.counts))

    def clear(self) -> None:
        before = self.allocator.num_available
        self.cache.clear()
        assert (self.allocator.num_free, self.allocator.num_cached) == (before, 0)
        while self.model is not None and self.model.stamps:
            self.model.evict()

    def _any(self) -> Held | None:
        return self.random.choice(self.sequences) if self.sequences else None

    def _reserve(self, held: Held, num_rows: int) -> bool:
        """Pages for so many rows; the sequence gives its own back where there are too few."""
        missing = -(-num_rows // PAGE_SIZE) - len(held.pages)
        if missing > self.allocator.num_available:
            self.sequences.remove(held)
            self._release(held.pages)
            self._remember(held.text)
            self.done["preemptions"] += 1
            return False
        evicted = self.cache.evictions
        pages = self.allocator.allocate(max(missing, 0))
        if self.model is not None:
            assert pages == self.model.take(len(pages))
        for page in pages:
            self._stored.pop(page, None)
        held.pages += pages
        self.done["evictions"] += self.cache.evictions - evicted
        return True

    def _publish(self, held: Held) -> None:
        num_full = held.num_rows // PAGE_SIZE
        last_rows = held.rows[PAGE_SIZE - 1 :: PAGE_SIZE][:num_full]
        expected = self.model.insert(last_rows, held.pages) if self.model is not None else None
        before = list(held.pages)
        self.cache.insert(
            held.text.cache_namespace, held.text.tokens, held.text.forms[:num_full], held.pages
        )
        assert expected is None or held.pages == expected
        self.done["adoptions"] += sum(a != b for a, b in zip(before, held.pages, strict=True))
        self._check_rows(held)

    def _release(self, pages: list[int]) -> None:
        self.allocator.release(pages)
        if self.model is not None:
            self.model.release(pages)

    def _check_rows(self, held: Held) -> None:
        """The pages hold this sequence's rows and no other's."""
        for i, page in enumerate(held.pages):
            expected = held.rows[i * PAGE_SIZE : min((i + 1) * PAGE_SIZE, held.num_rows)]
            assert self._stored.get(page, [])[: len(expected)] == expected

    def _rows(self, text: Text) -> list[int]:
        """A number for the row of each token: equal where all it depends on is equal."""
        rows: list[int] = []
        before: object = text.cache_namespace
        for position, token in enumerate(text.tokens):
            content = (before, token, text.forms[position // PAGE_SIZE])
            rows.append(self._row_numbers.setdefault(content, len(self._row_numbers)))
            before = rows[-1]
        return rows

    def _new_text(self) -> Text:
        text = Text(self.random.choice(SALTS), [], [])
        if self._texts and self.random.random() < 0.9:
            earlier = self.random.choice(self._texts)
            length = self.random.randint(0, len(earlier.tokens))
            text.tokens = earlier.tokens[:length]
            text.forms = earlier.forms[: -(-length // PAGE_SIZE)]
            if self.random.random() < 0.9:
                text.cache_namespace = earlier.cache_namespace
            if text.forms and self.random.random() < 0.1:
                text.forms[-1] = self.random.choice(FORMS)
        for _ in range(self.random.randint(0, min(5, MAX_TOKENS - len(text.tokens)))):
            self._append(text)
        return text

    def _append(self, text: Text) -> None:
        if len(text.tokens) % PAGE_SIZE == 0:
            text.forms.append(FORMS[self.random.random() < 0.1])
        text.tokens.append(self.random.randint(0, 1))

    def _remember(self, text: Text) -> None:
        self._texts.append(text)
        del self._texts[:-20]
