"""Automatic prefix caching (prompt caching): an index from tokens to KV cache pages by a chain
of SHA-256 block hashes (block: page), as in vLLM; not a radix tree.

Owns the index; `engine.page_allocator` owns the pages' states and evicts them.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from lowlat.engine.page_allocator import PageAllocator, require

Digest = Callable[[bytes], bytes]
"""Bytes to a key; finding a second preimage must be infeasible."""


@dataclass(frozen=True, slots=True)
class PageContent:
    """All that the KV cache entries of a page depend on, but the model."""

    key: bytes
    parent_key: bytes
    """Empty for the first page of a sequence."""
    cache_namespace: bytes
    path: str
    tokens: bytes
    depth: int


@dataclass(slots=True, eq=False)
class IndexedPage:
    """One indexed page, and all that its KV cache entries depend on."""

    key: bytes
    page: int
    parent: "IndexedPage | None"
    """The page before it; None for the first page of a sequence."""
    cache_namespace: bytes
    path: str
    """The attention path that computed the entries, as PrefillPlanner.page_path names it."""
    tokens: bytes
    """Packed, four bytes each."""
    depth: int
    """Pages before it."""
    num_children: int = 0
    """Indexed pages that follow it."""
    is_on_disk: bool = False
    """Whether it was read from the disk, or queued to be written to it."""

    @property
    def content(self) -> PageContent:
        parent_key = b"" if self.parent is None else self.parent.key
        return PageContent(
            self.key, parent_key, self.cache_namespace, self.path, self.tokens, self.depth
        )


class PrefixCache:
    """Finds the pages that hold the KV cache entries of a sequence's leading tokens.

    The key of a page (block hash in vLLM) is SHA-256 over its parent's key, its path and its
    tokens. The first parent's key is SHA-256 over the cache namespace. A lookup by key also
    compares namespace, tokens, path and parent. So a hash collision cannot expose another request's
    entries, and sequences of different namespaces share nothing.

    Invariant: the holder of an indexed page holds all the pages before it. `match` and `insert`
    maintain it. The caller maintains it by holding all leading pages of a sequence or none (fork:
    retain leading pages after they were inserted; shorten: release the last), and by releasing them
    in one call or the last ones first. So no page is evicted before those that follow it, every
    cached page can be evicted, and the indexed pages of a sequence are its leading ones.

    What mutates: `match`, `insert`, `adopt`, `withdraw`, `clear`, and the allocator when it evicts.
    Not thread-safe: only the engine's thread calls it. An allocator has one PrefixCache at most.
    Indexed pages must not be written; a sequence that continues writes into later pages.
    """

    def __init__(
        self, allocator: PageAllocator, *, page_size: int, digest: Digest | None = None
    ) -> None:
        require(page_size > 0, "a page holds at least one token")
        self.page_size = page_size
        self.queried_tokens = 0
        """Tokens looked up by `match`, over all calls."""
        self.hit_tokens = 0
        """Those of them whose pages were found."""
        self.evictions = 0
        """Pages removed from the index by eviction or `clear`."""
        self._allocator = allocator
        allocator.listen(self._forget)
        self._digest = digest or _sha256
        self._pack = struct.Struct(f"<{page_size}I").pack
        self._by_key: dict[bytes, IndexedPage] = {}
        self._by_page: dict[int, IndexedPage] = {}

    def __len__(self) -> int:
        """Number of indexed pages."""
        return len(self._by_key)

    def match(
        self, cache_namespace: bytes, tokens: Sequence[int], paths: Sequence[str]
    ) -> list[int]:
        """The pages of the longest indexed prefix of `tokens`, in order, each retained for the
        caller, which must release them.

        paths[i] is the path on which the caller would compute page i. At most len(paths) pages are
        looked up: a caller that needs the last token's logits leaves its page out.
        """
        self._check_lengths(tokens, paths)
        pages: list[int] = []
        parent: IndexedPage | None = None
        for index, path in enumerate(paths):
            indexed = self._find(parent, cache_namespace, path, self._packed(tokens, index))[1]
            if indexed is None:
                break
            pages.append(indexed.page)
            parent = indexed
        self._allocator.retain(pages)
        self.queried_tokens += len(tokens)
        self.hit_tokens += len(pages) * self.page_size
        return pages

    def insert(
        self, cache_namespace: bytes, tokens: Sequence[int], paths: Sequence[str], pages: list[int]
    ) -> None:
        """Index the first len(paths) pages of a sequence. The caller holds them, they are full and
        will not be written again, and paths[i] computed page i.

        If a page of equal content is already indexed, the caller's page is released and `pages`
        gets the indexed one, retained, in its place. A page with other holders, and what follows
        it, is not indexed until they release it: insert before forking. Later calls for the grown
        sequence cost only the new pages.
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
                return  # The other holder may not hold the indexed pages before this one.
            content = self._packed(tokens, index)
            key, indexed = self._find(parent, cache_namespace, paths[index], content)
            if indexed is None:
                if key in self._by_key:
                    return  # The keys collide: what follows is not indexed.
                indexed = IndexedPage(
                    key, pages[index], parent, cache_namespace, paths[index], content, index
                )
                self._add(indexed)
            else:
                self._allocator.retain([indexed.page])
                self._allocator.release([pages[index]])
                pages[index] = indexed.page
            parent = indexed

    def indexed(self, page: int) -> IndexedPage | None:
        """The index's record of a page; None if it is not indexed."""
        return self._by_page.get(page)

    def following(
        self, pages: Sequence[int], cache_namespace: bytes, tokens: Sequence[int], paths: list[str]
    ) -> list[PageContent]:
        """Contents of the pages of a sequence that follow `pages`, its leading ones, up to
        len(paths) pages in all; empty if the last of `pages` is not indexed."""
        self._check_lengths(tokens, paths)
        parent_key = b""
        if pages:
            last = self._by_page.get(pages[-1])
            if last is None:
                return []
            parent_key = last.key
        contents: list[PageContent] = []
        for index in range(len(pages), len(paths)):
            packed = self._packed(tokens, index)
            key = self._key(parent_key, cache_namespace, paths[index], packed)
            contents.append(
                PageContent(key, parent_key, cache_namespace, paths[index], packed, index)
            )
            parent_key = key
        return contents

    def lookup(self, parent: IndexedPage | None, content: PageContent) -> IndexedPage | None:
        """The page with this content that follows `parent`, if it is indexed."""
        return self._find(parent, content.cache_namespace, content.path, content.tokens)[1]

    def adopt(self, parent: IndexedPage | None, content: PageContent, page: int) -> bool:
        """Index `page`, filled from the disk or by a prefill process, which writes it to the disk.
        The caller holds it, `parent` and the pages before it. False, indexing nothing, if another
        page has its key."""
        if content.key in self._by_key:
            return False
        added = IndexedPage(
            content.key,
            page,
            parent,
            content.cache_namespace,
            content.path,
            content.tokens,
            content.depth,
            is_on_disk=True,
        )
        self._add(added)
        return True

    def withdraw(self, pages: Iterable[int]) -> list[PageContent]:
        """Remove `pages`, used ones too, and all pages that follow them from the index: their
        entries hold bad values. Returns their contents. O(indexed pages)."""
        doomed = [self._by_page[page] for page in pages if page in self._by_page]
        if not doomed:
            return []
        numbers = {indexed.page for indexed in doomed}
        for indexed in sorted(self._by_page.values(), key=attrgetter("depth")):
            follows = indexed.parent is not None and indexed.parent.page in numbers
            if follows and indexed.page not in numbers:
                doomed.append(indexed)
                numbers.add(indexed.page)
        contents = [indexed.content for indexed in doomed]
        for indexed in sorted(doomed, key=attrgetter("depth"), reverse=True):
            self._forget(indexed.page)
            self._allocator.unkeep(indexed.page)
        return contents

    def clear(self) -> None:
        """Evict every cached page; pages in use stay indexed."""
        self._allocator.evict_all()

    def check_integrity(self, holders: Iterable[Iterable[int]] | None = None) -> None:
        """Raise AssertionError unless allocator and index agree; includes the allocator's check.

        Every indexed page is used or cached and marked by `keep`, and every marked page is indexed.
        Every parent is indexed and has at least as many holders; a cached page is evicted before
        its parent. O(number of pages).
        """
        self._allocator.check_integrity(holders)
        kept = {page for page in range(self._allocator.num_pages) if self._allocator.is_kept(page)}
        require(kept == set(self._by_page), "the index and the kept pages disagree")
        require(len(self._by_page) == len(self._by_key), "keys and pages differ in number")
        rank = {page: place for place, page in enumerate(self._allocator.eviction_order())}
        children: dict[int, int] = {}
        for page, indexed in self._by_page.items():
            require(indexed.page == page, f"page {page} has the record of page {indexed.page}")
            require(
                self._by_key.get(indexed.key) is indexed, f"page {page} is not found by its key"
            )
            require(len(indexed.tokens) == 4 * self.page_size, f"page {page} is not whole")
            parent = indexed.parent
            if parent is None:
                require(indexed.depth == 0, f"page {page} has lost its parent")
                continue
            children[parent.page] = children.get(parent.page, 0) + 1
            require(self._by_page.get(parent.page) is parent, f"page {page}: parent unknown")
            require(indexed.depth == parent.depth + 1, f"page {page}: wrong depth")
            require(
                indexed.cache_namespace == parent.cache_namespace,
                f"page {page} has not its parent's cache_namespace",
            )
            held = self._allocator.num_holders(page)
            require(held <= self._allocator.num_holders(parent.page), f"page {page}: parent let go")
            if parent.page in rank:
                require(rank[page] < rank[parent.page], f"page {page} would outlive its parent")
        for page, indexed in self._by_page.items():
            require(indexed.num_children == children.get(page, 0), f"page {page}: children differ")

    def _packed(self, tokens: Sequence[int], index: int) -> bytes:
        """The tokens of page `index`."""
        return self._pack(*tokens[index * self.page_size : (index + 1) * self.page_size])

    def _find(
        self, parent: IndexedPage | None, cache_namespace: bytes, path: str, tokens: bytes
    ) -> tuple[bytes, IndexedPage | None]:
        """The key of a page, and its IndexedPage if exactly this page is indexed."""
        key = self._key(b"" if parent is None else parent.key, cache_namespace, path, tokens)
        indexed = self._by_key.get(key)
        if indexed is not None and (
            indexed.parent is not parent
            or indexed.cache_namespace != cache_namespace
            or indexed.path != path
            or indexed.tokens != tokens
        ):
            indexed = None
        return key, indexed

    def _key(self, parent_key: bytes, cache_namespace: bytes, path: str, tokens: bytes) -> bytes:
        """The key of a page; parent_key is empty for the first page of a sequence."""
        name = path.encode()
        # The path is length-prefixed, so that its end cannot be taken for the tokens' beginning.
        content = len(name).to_bytes(4, "little") + name + tokens
        return self._digest((parent_key or self._digest(cache_namespace)) + content)

    def _add(self, indexed: IndexedPage) -> None:
        self._allocator.keep(indexed.page)
        self._by_key[indexed.key] = indexed
        self._by_page[indexed.page] = indexed
        if indexed.parent is not None:
            indexed.parent.num_children += 1

    def _forget(self, page: int) -> None:
        """Remove an evicted page from the index."""
        indexed = self._by_page.pop(page)
        require(indexed.num_children == 0, f"page {page} is evicted before one that follows it")
        del self._by_key[indexed.key]
        if indexed.parent is not None:
            indexed.parent.num_children -= 1
        self.evictions += 1

    def _check_lengths(self, tokens: Sequence[int], paths: Sequence[str]) -> None:
        if len(paths) * self.page_size > len(tokens):
            raise AssertionError(f"{len(tokens)} tokens do not fill {len(paths)} pages")

    def _check_last(
        self, indexed: IndexedPage, cache_namespace: bytes, tokens: bytes, depth: int
    ) -> None:
        """Raise AssertionError unless the last indexed page has the caller's content."""
        if (indexed.cache_namespace, indexed.tokens, indexed.depth) != (
            cache_namespace,
            tokens,
            depth,
        ):
            raise AssertionError(f"page {indexed.page} is indexed with other content")


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
