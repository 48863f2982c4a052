"""What the kept pages of the cache hold, so that an equal beginning is computed once.

Owns the index from tokens to pages. `engine.pages` owns the pages' states and evicts them; whose
request is served, and by which arithmetic its rows are computed, is the engine's.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lowlat.engine.page_allocator import PageAllocator, require

Digest = Callable[[bytes], bytes]
"""Bytes to a key that nobody can find a second preimage of."""


@dataclass(slots=True, eq=False)
class Entry:
    """One page that the index knows, and all that its rows depend on."""

    key: bytes
    page: int
    parent: "Entry | None"
    """The page before it; None for the first page of a sequence."""
    cache_namespace: bytes
    path: str
    """By which arithmetic the rows were computed."""
    tokens: bytes
    """Packed, four bytes each."""
    depth: int
    """Pages before it."""
    num_children: int = 0
    """Known pages that follow it."""


class PrefixCache:
    """Finds the pages that hold the rows of a sequence's leading tokens.

    The key of a page is SHA-256 over its parent's key, its path and its tokens; the first parent's
    is SHA-256 over the cache_namespace. A key only says where to look: cache_namespace, tokens,
    path and parent are compared, so no collision can show one caller another's rows, and sequences
    of different namespaces share nothing.

    The rule that makes everything else simple: whoever holds an indexed page holds all the pages
    before it. `match` and `insert` see to it; the caller does so by holding the leading pages of a
    sequence or none of them (to fork is to retain leading pages after they were inserted, to
    shorten is to release the last), and by releasing them in one call or the last ones first. So a
    page is never given up before those that follow it, every cached page can be given up, and the
    indexed pages of a sequence are its leading ones.

    What mutates: `match`, `insert`, `withdraw`, `clear`, and the allocator when it evicts. Not
    thread-safe: only the engine's thread calls it. An allocator has one PrefixCache at most.
    Indexed pages must not be written; a sequence that continues after its whole pages writes into
    others.
    """

    def __init__(
        self, allocator: PageAllocator, *, page_size: int, digest: Digest | None = None
    ) -> None:
        require(page_size > 0, "a page holds at least one token")
        self.page_size = page_size
        self.queried_tokens = 0
        """Tokens that `match` was asked for, every call counted."""
        self.hit_tokens = 0
        """Those of them whose pages it found."""
        self.evictions = 0
        """Pages that were forgotten, those of `clear` included."""
        self._allocator = allocator
        allocator.listen(self._forget)
        self._digest = digest or _sha256
        self._pack = struct.Struct(f"<{page_size}I").pack
        self._by_key: dict[bytes, Entry] = {}
        self._by_page: dict[int, Entry] = {}

    def __len__(self) -> int:
        """Pages that are known."""
        return len(self._by_key)

    def match(
        self, cache_namespace: bytes, tokens: Sequence[int], paths: Sequence[str]
    ) -> list[int]:
        """The pages of the longest known beginning of `tokens`, in order, each with one holder
        more: the caller, who must release them.

        paths[i] is the path by which the caller would compute page i; at most len(paths) pages are
        looked for, so a caller that needs the last token's logits leaves its page out.
        """
        self._check_lengths(tokens, paths)
        pages: list[int] = []
        parent: Entry | None = None
        for index, path in enumerate(paths):
            entry = self._find(parent, cache_namespace, path, self._packed(tokens, index))[1]
            if entry is None:
                break
            pages.append(entry.page)
            parent = entry
        self._allocator.retain(pages)
        self.queried_tokens += len(tokens)
        self.hit_tokens += len(pages) * self.page_size
        return pages

    def insert(
        self, cache_namespace: bytes, tokens: Sequence[int], paths: Sequence[str], pages: list[int]
    ) -> None:
        """Make the first len(paths) pages of a sequence known. The caller holds them, they are full
        of rows that will not be written again, and paths[i] computed page i.

        Where a page of equal rows is known already, the caller's page is released and `pages` gets
        the known one, retained, in its place. A page that others hold as well, and what follows it,
        stays unknown until they let go: insert before forking. Calling again as the sequence grows
        costs only the pages that are new.
        """
        self._check_lengths(tokens, paths)
        require(len(pages) >= len(paths), "there are fewer pages than paths")
        start = len(paths)
        while start > 0 and pages[start - 1] not in self._by_page:
            start -= 1
        parent = self._by_page[pages[start - 1]] if start > 0 else None
        if parent is not None:
            self._check_last(parent, cache_namespace, self._packed(tokens, start - 1), start - 1)
        for index in range(start, len(paths)):
            if self._allocator.is_shared(pages[index]):
                return  # The other holder may not hold the known pages before this one.
            content = self._packed(tokens, index)
            key, entry = self._find(parent, cache_namespace, paths[index], content)
            if entry is None:
                if key in self._by_key:
                    return  # The keys collide: what follows stays unknown.
                entry = Entry(
                    key, pages[index], parent, cache_namespace, paths[index], content, index
                )
                self._add(entry)
            else:
                self._allocator.retain([entry.page])
                self._allocator.release([pages[index]])
                pages[index] = entry.page
            parent = entry

    def withdraw(self, pages: Iterable[int]) -> None:
        """Forget what is known of `pages`, whoever holds them, and of all pages that follow them:
        their rows are not to be trusted. Takes time for every known page."""
        doomed = [self._by_page[page] for page in pages if page in self._by_page]
        if not doomed:
            return
        numbers = {entry.page for entry in doomed}
        for entry in sorted(self._by_page.values(), key=_depth):
            follows = entry.parent is not None and entry.parent.page in numbers
            if follows and entry.page not in numbers:
                doomed.append(entry)
                numbers.add(entry.page)
        for entry in sorted(doomed, key=_depth, reverse=True):
            self._forget(entry.page)
            self._allocator.unkeep(entry.page)

    def clear(self) -> None:
        """Forget and free every cached page; pages in use stay known."""
        self._allocator.evict_all()

    def check_integrity(self, holders: Iterable[Iterable[int]] | None = None) -> None:
        """Raise AssertionError unless allocator and index agree, the allocator's own check
        included.

        Every entry's page is used or cached and marked as kept, every kept page has one entry,
        every entry's parent is known and has at least as many holders, and a cached page is given
        up before its parent. Takes time for every page of the allocator.
        """
        self._allocator.check_integrity(holders)
        kept = {page for page in range(self._allocator.num_pages) if self._allocator.is_kept(page)}
        require(kept == set(self._by_page), "the index and the kept pages disagree")
        require(len(self._by_page) == len(self._by_key), "keys and pages differ in number")
        rank = {page: place for place, page in enumerate(self._allocator.eviction_order())}
        children: dict[int, int] = {}
        for page, entry in self._by_page.items():
            require(entry.page == page, f"page {page} has the entry of page {entry.page}")
            require(self._by_key.get(entry.key) is entry, f"page {page} is not found by its key")
            require(len(entry.tokens) == 4 * self.page_size, f"page {page} is not whole")
            parent = entry.parent
            if parent is None:
                require(entry.depth == 0, f"page {page} has lost its parent")
                continue
            children[parent.page] = children.get(parent.page, 0) + 1
            require(self._by_page.get(parent.page) is parent, f"page {page}: parent unknown")
            require(entry.depth == parent.depth + 1, f"page {page}: wrong depth")
            require(
                entry.cache_namespace == parent.cache_namespace,
                f"page {page} has not its parent's cache_namespace",
            )
            held = self._allocator.num_holders(page)
            require(held <= self._allocator.num_holders(parent.page), f"page {page}: parent let go")
            if parent.page in rank:
                require(rank[page] < rank[parent.page], f"page {page} would outlive its parent")
        for page, entry in self._by_page.items():
            require(entry.num_children == children.get(page, 0), f"page {page}: children differ")

    def _packed(self, tokens: Sequence[int], index: int) -> bytes:
        """The tokens of page `index`."""
        return self._pack(*tokens[index * self.page_size : (index + 1) * self.page_size])

    def _find(
        self, parent: Entry | None, cache_namespace: bytes, path: str, tokens: bytes
    ) -> tuple[bytes, Entry | None]:
        """The key of a page, and its entry where exactly this page is known."""
        parent_key = self._digest(cache_namespace) if parent is None else parent.key
        name = path.encode()
        # The path's length comes before it: its end cannot be taken for the tokens' beginning.
        content = len(name).to_bytes(4, "little") + name + tokens
        key = self._digest(parent_key + content)
        entry = self._by_key.get(key)
        if entry is not None and (
            entry.parent is not parent
            or entry.cache_namespace != cache_namespace
            or entry.path != path
            or entry.tokens != tokens
        ):
            entry = None
        return key, entry

    def _add(self, entry: Entry) -> None:
        self._allocator.keep(entry.page)
        self._by_key[entry.key] = entry
        self._by_page[entry.page] = entry
        if entry.parent is not None:
            entry.parent.num_children += 1

    def _forget(self, page: int) -> None:
        """The allocator has given the page up."""
        entry = self._by_page.pop(page)
        require(entry.num_children == 0, f"page {page} is given up before one that follows it")
        del self._by_key[entry.key]
        if entry.parent is not None:
            entry.parent.num_children -= 1
        self.evictions += 1

    def _check_lengths(self, tokens: Sequence[int], paths: Sequence[str]) -> None:
        if len(paths) * self.page_size > len(tokens):
            raise AssertionError(f"{len(tokens)} tokens do not fill {len(paths)} pages")

    def _check_last(self, entry: Entry, cache_namespace: bytes, tokens: bytes, depth: int) -> None:
        """The last indexed page of a sequence must be what the caller says."""
        if (entry.cache_namespace, entry.tokens, entry.depth) != (cache_namespace, tokens, depth):
            raise AssertionError(f"page {entry.page} is known to hold other rows")


def _depth(entry: Entry) -> int:
    return entry.depth


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
