// Attention over splits of a context (flash decoding), by the fastest reader of its entries.
#pragma once

#include "chosen_attention.h"

namespace lowlat::LOWLAT_ISA {

// Attention over the splits [first, last) of a context that ends at `end`, merged into `state`; `part` holds one
// split.
template <class Reader>
inline void attend_splits(Reader reader, const CachedKeys& keys, const Queries& q, std::int64_t first,
                          std::int64_t last, std::int64_t end, const SoftmaxState& state, const SoftmaxState& part) {
  const auto start_of = [&](std::int64_t split) { return keys.chosen ? split * kSplit : split_start(split); };
  state.clear(q.rows);
  bool is_empty = true;
  for (std::int64_t split = first; split < last; ++split) {
    if (start_of(split + 1) <= q.first[0]) continue;  // outside every query's sliding window
    if (!is_empty) part.clear(q.rows);
    reader.attend_to(start_of(split), least(end, start_of(split + 1)), is_empty ? state : part);
    if (!is_empty) fold(part, state, q.rows);
    is_empty = false;
  }
}

// The same with the reader for the cache's storage. Uses slots 2, 5 to 7 and 10 to 15 of `scratch`.
inline void attend_splits(const CachedKeys& keys, const Queries& q, std::int64_t first, std::int64_t last,
                          std::int64_t end, Scratch& scratch, const SoftmaxState& state, const SoftmaxState& part) {
#if defined(LOWLAT_AVX512)
  // bf16 products by AMX tiles are as fast and round less.
  if (kMultipliesByDots && keys.are_integers()) {
    return attend_splits(IntegerReader(keys, q, scratch), keys, q, first, last, end, state, part);
  }
#endif
  attend_splits(PlainReader(keys, q, scratch), keys, q, first, last, end, state, part);
}

// Splits [first, last) of the contexts of `tokens` tokens: keys.chosen is [tokens, topk], queries_of(t) has `heads` rows,
// and the rows of token t's state begin at t times `heads` rounded up to a tile. The scratch is that of attend_splits().
template <class QueriesOf>
inline void attend_chosen(const CachedKeys& keys, std::int64_t topk, std::int64_t tokens, std::int64_t heads,
                          std::int64_t first, std::int64_t last, QueriesOf&& queries_of, Scratch& scratch,
                          const SoftmaxState& state, const SoftmaxState& part) {
  const std::int64_t rows = round_up(heads, kTile);
#if defined(LOWLAT_AMX)
  if (ChosenReader::reads(keys)) {
    ChosenReader reader(keys, tokens, heads, scratch);
    for (std::int64_t t = 0; t < tokens; ++t) reader.load_queries(t, queries_of(t));
    for (std::int64_t split = first; split < last; ++split) {
      const SoftmaxState& own = split == first ? state : part;
      own.clear(tokens * rows);
      reader.attend_interleaved(tokens, topk, split * kSplit, least(topk, (split + 1) * kSplit), own);
      if (split > first) fold(part, state, tokens * rows);
    }
    return;
  }
#endif
  for (std::int64_t t = 0; t < tokens; ++t) {
    CachedKeys own = keys;
    own.chosen += t * topk;
    attend_splits(own, queries_of(t), first, last, topk, scratch, state.from(t * rows), part);
  }
}

}  // namespace lowlat::LOWLAT_ISA
