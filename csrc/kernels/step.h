// One step of a model: embedding (or an MTP module's input), decoder layers, final norm, LM head.
#pragma once

#include "attention_phases.h"
#include "divided_mlp.h"

namespace lowlat::LOWLAT_ISA {

// The embedding of a token of the step.
inline void embed_token(const Pass& pass, std::int64_t token, bf16* out) {
  const Matrix& w = *pass.model.embedding;
  const std::int64_t row = pass.step.ids[token];
  if (w.storage == Storage::gguf) return gguf::dequantize_row(w, row, out);
  std::memcpy(out, static_cast<const bf16*>(w.data) + row * w.stride, w.columns * sizeof(bf16));
}

inline void embed(const Pass& pass) {
  const Workspace& work = pass.work;
  const float scale = pass.model.embedding_scale;
  pass.each_token([&](std::int64_t t) {
    bf16* x = work.x + t * work.hidden.stride;
    embed_token(pass, t, x);
    if (scale != 1) scale_row(x, scale, pass.model.hidden, x);
  });
}

inline void embed_mtp_input(const Pass& pass, const MtpInput& mtp_input) {
  const Workspace& work = pass.work;
  const std::int64_t hidden = pass.model.hidden;
  pass.each_token([&](std::int64_t t) {
    bf16* row = work.joined.values + t * work.joined.stride;
    embed_token(pass, t, row);
    rms_norm(mtp_input.embedding_norm, row, row);
    rms_norm(mtp_input.hidden_norm, pass.step.previous + t * hidden, row + hidden);
    pad_row(row, 2 * hidden);
  });
  multiply_all(pass, {Product{&mtp_input.projection, &work.joined, work.x, work.hidden.stride}});
}

// The residual stream of the pipeline stage before this one.
inline void load_residual(const Pass& pass) {
  const Workspace& work = pass.work;
  const std::int64_t hidden = pass.model.hidden;
  pass.each_token([&](std::int64_t t) {
    std::memcpy(work.x + t * work.hidden.stride, pass.step.previous + t * hidden, hidden * sizeof(bf16));
  });
}

// The residual stream into step.hidden, for the next stage.
inline void store_residual(const Pass& pass) {
  const Workspace& work = pass.work;
  const std::int64_t hidden = pass.model.hidden;
  pass.each_token([&](std::int64_t t) {
    std::memcpy(pass.step.hidden + t * hidden, work.x + t * work.hidden.stride, hidden * sizeof(bf16));
  });
}

// The final norm of every token into step.hidden.
inline void final_norm(const Pass& pass) {
  const std::int64_t hidden = pass.model.hidden;
  pass.each_token([&](std::int64_t t) {
    rms_norm(*pass.model.norm, pass.work.x + t * pass.work.hidden.stride, pass.step.hidden + t * hidden);
  });
}

// Logits of the requested tokens: their rows are first gathered at the start of work.hidden.
inline void make_logits(const Pass& pass) {
  const Workspace& work = pass.work;
  const Matrix& head = pass.model.head->weight;
  const auto wanted = static_cast<std::int64_t>(pass.step.wanted.size());
  if (wanted == 0) return;
  pass.each(wanted, [&](std::int64_t i) {
    bf16* row = work.hidden.values + i * work.hidden.stride;
    std::memcpy(row, pass.step.hidden + pass.step.wanted[i] * pass.model.hidden, pass.model.hidden * sizeof(bf16));
    pad_row(row, pass.model.hidden);
  });
  Activations x = work.hidden;
  x.rows = wanted;
  const bool is_part = head.rows < pass.step.vocab;
  float* logits = is_part ? begin_exchange<float>(pass, wanted * head.rows) : pass.step.logits;
  pass.each_in_turn(num_strips(head), [&](std::int64_t strip, bool continues) {
    float* out = pass.strip_out(wanted);
    multiply_strip(head, strip, x, pass.panels(head), out, next_strip(head, strip, continues));
    const std::int64_t first = strip * kStrip, count = least(kStrip, head.rows - first);
    for (std::int64_t i = 0; i < wanted; ++i) {
      std::memcpy(logits + i * head.rows + first, out + i * kStrip, count * sizeof(float));
    }
  });
  if (is_part) exchange_columns(pass, wanted, head.rows, pass.step.logits, pass.step.vocab);
}

// The residual stream before part `number` of the model; attention and MLP of a layer count as one each.
inline void keep_residual(const Pass& pass, std::int64_t number) {
  if (pass.step.residuals == nullptr) return;
  const std::int64_t hidden = pass.model.hidden;
  bf16* out = pass.step.residuals + number * pass.step.tokens * hidden;
  pass.each_token([&](std::int64_t t) {
    std::memcpy(out + t * hidden, pass.work.x + t * pass.work.hidden.stride, hidden * sizeof(bf16));
  });
}

// Run by every thread of the team; work.prepare() must have been called.
inline void run_step(Team& team, const Model& model, const Step& step, Workspace& work) {
  const ProductSession session;
  const Pass pass{team, model, step, work, work.scratch[team.thread()]};
  if (model.mtp_input) {
    embed_mtp_input(pass, *model.mtp_input);
  } else if (model.embedding) {
    embed(pass);
  } else {
    load_residual(pass);
  }
  std::int64_t number = 0;
  for (const Layer& layer : model.layers) {
    if (model.is_larger_than_memory && team.thread() == 0 && &layer != &model.layers.back()) read_ahead(*(&layer + 1));
    keep_residual(pass, 2 * number);
    add_attention(pass, layer, number);
    keep_residual(pass, 2 * number++ + 1);
    if (model.division.is_whole()) {
      add_mlp(pass, layer);
    } else {
      make_mlp_rows(pass, layer);
      add_divided_mlp(pass, layer);
    }
  }
  keep_residual(pass, 2 * number);
  if (!model.norm) return store_residual(pass);
  final_norm(pass);
  make_logits(pass);
}

}  // namespace lowlat::LOWLAT_ISA
