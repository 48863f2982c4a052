"""Selection of documents: exact deduplication (no fuzzy one such as MinHash), and the held-out
split by content hash.

`sources` reads documents, `tokenizing` encodes them.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from lowlat.data.documents import BadDocument, Document, ReadOptions
from lowlat.data.manifest import Split
from lowlat.data.sources import read_sources
from lowlat.data.writer import SHARD_TOKENS

EMPTY, DUPLICATE, INVALID = "empty", "duplicate", "invalid"
DEFAULT_HELD_OUT = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """Options of a dataset build."""

    sources: tuple[str, ...]
    """Files, folders, datasets:NAME."""
    held_out_sources: tuple[str, ...] = ()
    """Sources whose documents are all held out; copies in `sources` are dropped."""
    held_out: float | None = None
    """Share of the documents of `sources` to hold out, selected by content hash; None: 0.01
    without `held_out_sources`, else 0.
    """
    end_of_text: str | None = None
    """Token that ends a document; None: the tokenizer's end of text."""
    read: ReadOptions = field(default_factory=ReadOptions)
    """How sources are read."""
    shard_tokens: int = SHARD_TOKENS
    """Ids per file."""

    @property
    def held_out_share(self) -> float:
        """`held_out` with its default."""
        if self.held_out is not None:
            return self.held_out
        return 0.0 if self.held_out_sources else DEFAULT_HELD_OUT


class Selection:
    """Iterates over the selected documents and their splits.

    Exact duplicates are dropped. The split of a document depends only on its content hash. Memory:
    about 100 bytes per document.
    """

    def __init__(self, options: BuildOptions) -> None:
        self.dropped: Counter[str] = Counter()
        """Number of dropped documents by reason."""
        self._options = options
        self._seen: set[bytes] = set()

    def __iter__(self) -> Iterator[tuple[Document, Split, int]]:
        """(document, split, bytes of text); documents of held-out sources come first."""
        options = self._options
        share = options.held_out_share
        for sources, held_out in ((options.held_out_sources, 1.0), (options.sources, share)):
            for document in read_sources(sources, options.read):
                try:
                    if isinstance(document, BadDocument):
                        raise document
                    digest, size, is_written = document.fingerprint()
                except BadDocument:
                    if options.read.invalid != "skip":
                        raise
                    self.dropped[INVALID] += 1
                    continue
                if not is_written:
                    self.dropped[EMPTY] += 1
                elif digest[:16] in self._seen:
                    self.dropped[DUPLICATE] += 1
                else:
                    self._seen.add(digest[:16])
                    is_held = int.from_bytes(digest[-6:], "big") < held_out * 2.0**48
                    yield document, "held_out" if is_held else "train", size
