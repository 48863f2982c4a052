// One thread's view of a step: parallel loops with barriers over team, model and workspace.
#pragma once

#include "../thread_pool.h"
#include "../workspace.h"
#include "linear.h"

namespace lowlat::LOWLAT_ISA {

// One thread's view of a step. Every thread runs the same phases; a phase ends with a barrier.
struct Pass {
  Team& team;
  const Model& model;
  const Step& step;
  Workspace& work;
  Scratch& scratch;

  // body(item) for every item of [0, count), on any thread.
  template <class Body>
  void each(std::int64_t count, Body&& body) const {
    each_in_turn(count, [&](std::int64_t item, bool) { body(item); });
  }

  // The same with body(item, continues): whether this thread also runs item + 1.
  template <class Body>
  void each_in_turn(std::int64_t count, Body&& body) const {
    discard_packed_rows();  // of the previous phase
    team.for_shrinking_chunks(count, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t item = first; item < last; ++item) body(item, item + 1 < last);
    });
  }

  // body() on one thread while the others wait.
  template <class Body>
  void once(Body&& body) const {
    if (team.thread() == 0) body();
    team.barrier();
  }

  // body(row) for every token.
  template <class Body>
  void each_token(Body&& body) const {
    if (step.tokens == 1) return once([&] { body(0); });
    each(step.tokens, body);
  }

  // A thread's products of a strip, and the panels that multiply_strip() may need.
  float* strip_out(std::int64_t rows, int slot = 0) const { return scratch.get<float>(slot, rows * kStrip); }
  Panel* panels(const Matrix& w) const { return scratch.get<Panel>(2, strip_panels(w)); }
};

}  // namespace lowlat::LOWLAT_ISA
