"""Random test driver of page allocator and prefix cache, checked step by step with a plain model.

Sequences take, share, fill, index and release pages at random. The plain model searches dicts and
lists from end to end. Numbers stand in for KV cache entries: they differ if namespace, attention
path or any token up to there differ, so a page found for the wrong sequence is detected at once.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

from lowlat.engine.page_allocator import PageAllocator
from lowlat.engine.prefix import Digest, PrefixCache

PAGE_SIZE = 3
NAMESPACES = (b"", b"one", b"two")
PATHS = ("decode", "expanded")
MAX_TOKENS = 24
MAX_PAGES = 24
MAX_SEQUENCES = 8


@dataclass
class Text:
    """What a sequence's entries depend on; page i is computed on paths[i]."""

    cache_namespace: bytes
    tokens: list[int]
    paths: list[str]


@dataclass
class Held:
    """A sequence that is running."""

    text: Text
    pages: list[int]
    num_entries: int
    """Leading tokens whose entries are computed."""
    entries: list[int] = field(default_factory=list)
    """What the entry of each token must be."""


class Model:
    """The allocator and the prefix cache, as simple as possible."""

    def __init__(self, num_pages: int) -> None:
        self.counts = [0] * num_pages
        self.known: dict[int, int] = {}
        """Last entry of a page -> page."""
        self.before: dict[int, int | None] = {}
        """Last entry of a known page -> last entry of the page before it."""
        self.stamps: dict[int, int] = {}
        """Cached page -> clock of its release."""
        self.clock = 0

    def entry_of(self, page: int) -> int | None:
        return next((entry for entry, known in self.known.items() if known == page), None)

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
        leaves = [page for page in self.stamps if self.entry_of(page) not in parents]
        page = min(leaves, key=self.stamps.__getitem__)
        entry = self.entry_of(page)
        assert entry is not None
        del self.stamps[page], self.known[entry], self.before[entry]
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

    def match(self, entries: list[int]) -> list[int]:
        """`entries` has the last entry of each page asked for."""
        pages: list[int] = []
        for entry in entries:
            if entry not in self.known:
                break
            pages.append(self.known[entry])
        self.retain(pages)
        return pages

    def insert(self, entries: list[int], pages: list[int]) -> list[int]:
        """The pages the sequence has afterwards."""
        pages = list(pages)
        for i, entry in enumerate(entries):
            if self.known.get(entry) == pages[i]:
                continue
            if self.counts[pages[i]] > 1:
                break
            if entry in self.known:
                self.retain([self.known[entry]])
                self.release([pages[i]])
                pages[i] = self.known[entry]
            else:
                self.known[entry] = pages[i]
                self.before[entry] = entries[i - 1] if i > 0 else None
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
        self._entry_numbers: dict[tuple[object, ...], int] = {}
        self._stored: dict[int, list[int]] = {}
        """Page -> the entries written into it."""

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
            self._check_entries(sequence)
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
        held = Held(text, [], 0, self._entries(text))
        asked = len(text.tokens) // PAGE_SIZE
        held.pages = self.cache.match(text.cache_namespace, text.tokens, text.paths[:asked])
        if self.model is not None:
            assert held.pages == self.model.match(held.entries[PAGE_SIZE - 1 :: PAGE_SIZE][:asked])
        held.num_entries = PAGE_SIZE * len(held.pages)
        self._check_entries(held)
        self.sequences.append(held)
        self.done["hit pages"] += len(held.pages)
        return None

    def extend(self) -> None:
        """Compute more entries of a sequence, with random tokens after its last one."""
        held = self._any()
        if held is None or held.num_entries == MAX_TOKENS:
            return
        end = min(held.num_entries + self.random.randint(1, 7), MAX_TOKENS)
        if not self._reserve(held, end):
            return
        while len(held.text.tokens) < end:
            self._append(held.text)
        held.entries = self._entries(held.text)
        for position in range(held.num_entries, end):
            page = held.pages[position // PAGE_SIZE]
            assert not self.allocator.is_shared(page) and not self.allocator.is_kept(page)
            written = self._stored.setdefault(page, [])
            del written[position % PAGE_SIZE :]
            written.append(held.entries[position])
        held.num_entries = end
        if self.random.random() < 0.7:
            self._publish(held)

    def fork(self) -> None:
        """Fork: a second sequence continues after the same entries, on its own pages."""
        held = self._any()
        if held is None or len(self.sequences) == MAX_SEQUENCES:
            return
        if self.random.random() < 0.5:
            self._publish(held)
        num_full = held.num_entries // PAGE_SIZE
        shared = held.pages[:num_full]
        self.allocator.retain(shared)
        if self.model is not None:
            self.model.retain(shared)
        text = Text(
            held.text.cache_namespace,
            held.text.tokens[: num_full * PAGE_SIZE],
            held.text.paths[:num_full],
        )
        entries = held.entries[: num_full * PAGE_SIZE]
        self.sequences.append(Held(text, shared, num_full * PAGE_SIZE, entries))
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
        num_left = self.random.randint(0, held.num_entries // PAGE_SIZE)
        self._release(held.pages[num_left:])
        del held.pages[num_left:]
        held.num_entries = num_left * PAGE_SIZE
        held.text = Text(
            held.text.cache_namespace,
            held.text.tokens[: held.num_entries],
            held.text.paths[:num_left],
        )
        held.entries = held.entries[: held.num_entries]

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

    def _reserve(self, held: Held, num_entries: int) -> bool:
        """Pages for this many entries; the sequence releases its own if too few are free."""
        missing = -(-num_entries // PAGE_SIZE) - len(held.pages)
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
        num_full = held.num_entries // PAGE_SIZE
        last_entries = held.entries[PAGE_SIZE - 1 :: PAGE_SIZE][:num_full]
        expected = self.model.insert(last_entries, held.pages) if self.model is not None else None
        before = list(held.pages)
        self.cache.insert(
            held.text.cache_namespace, held.text.tokens, held.text.paths[:num_full], held.pages
        )
        assert expected is None or held.pages == expected
        self.done["adoptions"] += sum(a != b for a, b in zip(before, held.pages, strict=True))
        self._check_entries(held)

    def _release(self, pages: list[int]) -> None:
        self.allocator.release(pages)
        if self.model is not None:
            self.model.release(pages)

    def _check_entries(self, held: Held) -> None:
        """The pages hold this sequence's entries and no other's."""
        for i, page in enumerate(held.pages):
            expected = held.entries[i * PAGE_SIZE : min((i + 1) * PAGE_SIZE, held.num_entries)]
            assert self._stored.get(page, [])[: len(expected)] == expected

    def _entries(self, text: Text) -> list[int]:
        """A number for the entry of each token: equal if everything it depends on is equal."""
        entries: list[int] = []
        before: object = text.cache_namespace
        for position, token in enumerate(text.tokens):
            content = (before, token, text.paths[position // PAGE_SIZE])
            entries.append(self._entry_numbers.setdefault(content, len(self._entry_numbers)))
            before = entries[-1]
        return entries

    def _new_text(self) -> Text:
        text = Text(self.random.choice(NAMESPACES), [], [])
        if self._texts and self.random.random() < 0.9:
            earlier = self.random.choice(self._texts)
            length = self.random.randint(0, len(earlier.tokens))
            text.tokens = earlier.tokens[:length]
            text.paths = earlier.paths[: -(-length // PAGE_SIZE)]
            if self.random.random() < 0.9:
                text.cache_namespace = earlier.cache_namespace
            if text.paths and self.random.random() < 0.1:
                text.paths[-1] = self.random.choice(PATHS)
        for _ in range(self.random.randint(0, min(5, MAX_TOKENS - len(text.tokens)))):
            self._append(text)
        return text

    def _append(self, text: Text) -> None:
        if len(text.tokens) % PAGE_SIZE == 0:
            text.paths.append(PATHS[self.random.random() < 0.1])
        text.tokens.append(self.random.randint(0, 1))

    def _remember(self, text: Text) -> None:
        self._texts.append(text)
        del self._texts[:-20]
