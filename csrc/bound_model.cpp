#include "bound_model.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <mutex>
#include <tuple>
#include <utility>

#include "bound_attention.h"
#include "bound_cache.h"
#include "bound_exchange.h"
#include "bound_kept.h"
#include "bound_mlp.h"
#include "bound_parts.h"
#include "dispatch.h"
#include "thread_pool.h"
#include "step_state.h"

namespace lowlat {

namespace {

using namespace nb::literals;

BoundLayer make_layer(const BoundNorm& input_norm, const BoundNorm& post_attention_norm,
                      const BoundAttention& attention, std::int64_t first_pair, const std::optional<BoundMlp>& mlp,
                      const std::optional<BoundMoe>& moe, const std::optional<BoundNorm>& post_mlp_norm) {
  BoundLayer bound;
  bound.part.input_norm = bound.keep(input_norm);
  bound.part.post_attention_norm = bound.keep(post_attention_norm);
  bound.part.attention = bound.keep(attention);
  bound.part.attention.first_pair = first_pair;
  require(first_pair >= 0, "first_pair is negative");
  bound.part.mlp = bound.keep(mlp);
  if (moe) {
    bound.part.moe = moe->part;
    bound.expert_owners = moe->owners;
  }
  bound.part.post_mlp_norm = bound.keep(post_mlp_norm);
  return bound;
}

BoundMtpInput make_mtp_input(const BoundNorm& embedding_norm, const BoundNorm& hidden_norm, const BoundProjection& projection) {
  BoundMtpInput bound;
  bound.part = {bound.keep(embedding_norm), bound.keep(hidden_norm), bound.keep(projection)};
  const MtpInput& mtp_input = bound.part;
  require(mtp_input.embedding_norm.size == mtp_input.hidden_norm.size, "a module's norms have different sizes");
  require_shape(mtp_input.projection.weight, mtp_input.hidden_norm.size, 2 * mtp_input.hidden_norm.size, "a module's projection");
  return bound;
}

// A sequence of a step: its page table, entries cached before the step, new tokens, whether MLA takes the expanded
// path, and its LoRA adapter or -1.
using SequenceArgs = std::tuple<std::vector<std::int32_t>, std::int64_t, std::int64_t, bool, std::int32_t>;

// Sizes of tensor and expert parallelism, the expert rank, and the processes that divide the head.
using DivisionArgs = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

class BoundModel {
 public:
  BoundModel(const std::optional<BoundMatrix>& embedding, const std::optional<BoundMtpInput>& mtp_input,
             const std::vector<BoundLayer>& layers, std::int64_t first_layer, const std::optional<BoundNorm>& norm,
             const std::optional<BoundProjection>& head, bool is_larger_than_memory, float embedding_scale,
             float residual_scale, const DivisionArgs& division)
      : model_(assemble(embedding, mtp_input, layers, norm, head, division)) {
    require(first_layer >= 0, "first_layer is negative");
    model_.first_layer = first_layer;
    model_.is_larger_than_memory = is_larger_than_memory;
    model_.embedding_scale = embedding_scale;
    model_.residual_scale = residual_scale;
  }

  void step(const Array& ids, const std::optional<Array>& previous, const Array& slots, const Array& cos,
            const Array& sin, const std::vector<SequenceArgs>& sequences, const BoundCache& cache, const Array& hidden,
            const std::vector<std::int64_t>& wanted, const std::optional<Array>& logits, bool is_decode,
            const std::optional<Array>& query_scale, const std::optional<nb::callable>& exchange,
            const std::optional<Array>& residuals, const std::optional<Array>& experts, const std::optional<Array>& gates) {
    StepState& own = step_state_.get(model_);
    const std::unique_lock one_step = lock(own);
    Step step;
    read_tokens(step, ids, slots, cos, sin);
    require(previous.has_value() == (model_.mtp_input || !model_.embedding),
            "MTP modules and stages without an embedding take previous hidden states, and no others");
    if (previous) step.previous = elements<bf16>(*previous, "previous", Type::bf16, {step.tokens, model_.hidden});
    if (query_scale) step.query_scale = elements<float>(*query_scale, "query_scale", Type::fp32, {step.tokens});
    read_cache(step, cache);
    read_sequences(step, sequences, cache);
    step.hidden = elements<bf16>(hidden, "hidden", Type::bf16, {step.tokens, model_.hidden});
    for (const std::int64_t row : wanted) require(row >= 0 && row < step.tokens, "a wanted token is outside the step");
    step.wanted = wanted;
    step.is_decode = is_decode;
    if (logits) {
      const auto rows = static_cast<std::int64_t>(wanted.size());
      step.vocab = model_.head ? model_.head->weight.rows * head_parts_ : 0;
      step.logits = elements<float>(*logits, "logits", Type::fp32, {rows, step.vocab});
    }
    require(wanted.empty() || (logits && model_.head), "wanted tokens need logits and a head");
    read_kept(step, model_, residuals, experts, gates);
    require(exchange.has_value() != model_.division.is_whole(), "divided models need an exchange, and no others");
    std::optional<CalledExchange> called;
    if (exchange) step.exchange = &called.emplace(*exchange);
    if (step.tokens == 0) return;
    const nb::gil_scoped_release released;
    const Ops& table = ops();
    const std::shared_ptr<Pool> team = pool();
    own.work.prepare(model_, step, team->threads());
    team->run([&](Team& member) { table.step(member, model_, step, own.work); });
  }

  // Counts the rows of every expert from the next step on.
  void count_expert_loads() {
    const std::unique_lock one_step = lock(step_state_.get(model_));
    model_.counts_loads = true;
  }

  // Rows of every expert in all steps that counted them, [layers, experts]; empty if none did.
  std::vector<std::vector<std::int64_t>> expert_loads() {
    StepState& own = step_state_.get(model_);
    const std::unique_lock one_step = lock(own);
    std::vector<std::vector<std::int64_t>> found;
    const auto experts = static_cast<std::ptrdiff_t>(own.work.experts());
    for (auto row = own.work.loads.begin(); row != own.work.loads.end(); row += experts) found.emplace_back(row, row + experts);
    return found;
  }

  // Replaces the experts of a layer between two steps.
  void place_experts(std::size_t layer, const BoundMoe& moe) {
    const std::unique_lock one_step = lock(step_state_.get(model_));
    require(layer < model_.layers.size() && model_.layers[layer].moe, "the layer has no experts");
    Layer changed = model_.layers[layer];
    changed.moe = moe.part;
    check_layer(model_, changed);
    model_.layers[layer].moe = moe.part;
    expert_owners_[layer] = moe.owners;
  }

 private:
  // Does not wait for the mutex while holding the GIL: the running step needs the GIL before it releases the mutex.
  static std::unique_lock<std::mutex> lock(StepState& own) {
    std::unique_lock one_step(own.mutex, std::defer_lock);
    const nb::gil_scoped_release released;
    one_step.lock();
    return one_step;
  }

  Model assemble(const std::optional<BoundMatrix>& embedding, const std::optional<BoundMtpInput>& mtp_input,
                 const std::vector<BoundLayer>& layers, const std::optional<BoundNorm>& norm,
                 const std::optional<BoundProjection>& head, const DivisionArgs& division) {
    require(!layers.empty(), "a model has no layers");
    Model model;
    std::tie(model.division.tensor, model.division.experts, model.division.expert_rank, head_parts_) = division;
    require(model.division.tensor > 0 && model.division.experts > 0 && head_parts_ > 0 &&
                (head_parts_ == 1 || head_parts_ == model.division.tensor) && model.division.expert_rank >= 0 &&
                model.division.expert_rank < model.division.experts,
            "the division has no such sizes");
    model.hidden = layers[0].part.input_norm.size;
    if (embedding) {
      model.embedding = embedding->matrix;
      owners_.insert(owners_.end(), embedding->owners.begin(), embedding->owners.end());
      require(model.embedding->storage == Storage::bf16 || model.embedding->storage == Storage::gguf,
              "the embedding is neither bf16 nor in GGUF blocks");
      require(model.embedding->columns == model.hidden, "a layer has another width than the embedding");
    }
    const auto keep = [&](const auto& bound) {
      owners_.insert(owners_.end(), bound.owners.begin(), bound.owners.end());
      return bound.part;
    };
    if (mtp_input) {
      model.mtp_input = keep(*mtp_input);
      require(model.embedding.has_value(), "an MTP module needs an embedding");
      require(model.mtp_input->hidden_norm.size == model.hidden, "a module has another width than the embedding");
    }
    for (const BoundLayer& layer : layers) {
      model.layers.push_back(keep(layer));
      expert_owners_.push_back(layer.expert_owners);
      check_layer(model, model.layers.back());
    }
    require(norm.has_value() == head.has_value(), "the final norm and the head come together");
    if (!norm) return model;
    model.norm = keep(*norm);
    model.head = keep(*head);
    require(model.norm->size == model.hidden, "the final norm has another size than the embedding");
    const Matrix& weight = model.head->weight;
    require_shape(weight, model.embedding ? model.embedding->rows / head_parts_ : weight.rows, model.hidden, "head");
    return model;
  }

  static void check_layer(const Model& model, const Layer& layer) {
    const Attention &a = layer.attention, &first = model.layers[0].attention;
    const Projection& input = a.q_a ? *a.q_a : a.q;
    require(layer.input_norm.size == model.hidden && layer.post_attention_norm.size == model.hidden &&
                input.weight.columns == model.hidden && a.o.weight.rows * model.division.tensor == model.hidden &&
                a.o.weight.columns == a.heads * a.out_dim() * model.division.tensor &&
                (!a.is_mla() || a.kv_a.weight.columns == model.hidden),
            "a layer has another width than the embedding");
    require(a.heads == first.heads && a.kv_heads == first.kv_heads && a.is_mla() == first.is_mla(),
            "the layers' attention differs in form or heads");
    require(!layer.post_mlp_norm || layer.post_mlp_norm->size == model.hidden, "an MLP's norm has another width");
    require(a.topk == first.topk && (a.topk == 0 || first.indexer), "the layers choose different numbers of tokens, or the first none");
    require(layer.mlp || layer.moe, "a layer has no MLP");
    if (layer.mlp) check_mlp(model, *layer.mlp, model.division.tensor);
    if (!layer.moe) return;
    require(static_cast<std::int64_t>(layer.moe->experts.size()) * model.division.experts ==
                static_cast<std::int64_t>(layer.moe->places.size()),
            "the experts are divided in another way");
    require(layer.moe->router.weight.columns == model.hidden, "a router has another width");
    for (const Mlp& mlp : layer.moe->experts) check_mlp(model, mlp, 1);
  }

  static void check_mlp(const Model& model, const Mlp& mlp, std::int64_t parts) {
    require(mlp.gate.weight.columns == model.hidden, "an MLP has another width");
    require_shape(mlp.down.weight, model.hidden / parts, mlp.gate.weight.rows * parts, "down");
    require(model.hidden % parts == 0, "the width is not divisible");
  }

  void read_tokens(Step& step, const Array& ids, const Array& slots, const Array& cos, const Array& sin) const {
    step.tokens = size(ids, 0);
    step.ids = elements<std::int64_t>(ids, "ids", Type::int64, {step.tokens});
    step.slots = elements<std::int64_t>(slots, "slots", Type::int64, {step.tokens});
    step.pairs = size(cos, 1);
    for (const Layer& layer : model_.layers) {
      const Attention& a = layer.attention;
      require(a.first_pair <= step.pairs - a.rope_dim / 2, "cos and sin have too few pairs");
    }
    step.cos = elements<float>(cos, "cos", Type::fp32, {step.tokens, step.pairs});
    step.sin = elements<float>(sin, "sin", Type::fp32, {step.tokens, step.pairs});
    for (std::int64_t t = 0; t < step.tokens; ++t) {
      require(!model_.embedding || (step.ids[t] >= 0 && step.ids[t] < model_.embedding->rows),
              "a token id is outside the vocabulary");
    }
  }

  void read_cache(Step& step, const BoundCache& cache) const {
    const auto first = static_cast<std::size_t>(model_.first_layer);
    require(cache.layers.size() >= first + model_.layers.size(), "the cache has too few layers");
    for (std::size_t layer = 0; layer < model_.layers.size(); ++layer) {
      require(cache.entry_dims[first + layer] == model_.layers[layer].attention.entry_dim(), "the cache has rows of another width");
    }
    for (std::size_t layer = 0; layer < model_.layers.size(); ++layer) {
      const std::optional<Indexer>& indexer = model_.layers[layer].attention.indexer;
      require(cache.index_dims[first + layer] == (indexer ? indexer->dim : 0), "the cache has index keys of another width");
    }
    step.caches = cache.layers.data() + first;
    step.index_caches = cache.index_layers.data() + first;
    const std::int64_t slots = cache.pages * cache.page_size();
    for (std::int64_t t = 0; t < step.tokens; ++t) {
      require(step.slots[t] >= 0 && step.slots[t] < slots, "a slot is outside the cache");
    }
  }

  static void read_sequences(Step& step, const std::vector<SequenceArgs>& sequences, const BoundCache& cache) {
    std::int64_t token = 0;
    bool has_adapters = false;
    for (const auto& [pages, start, length, is_expanded, adapter] : sequences) {
      require(start >= 0 && length > 0, "a sequence has no new tokens");
      const auto rows = static_cast<std::int64_t>(pages.size()) * cache.page_size();
      require(length <= rows && start <= rows - length, "a sequence has too few pages");
      for (const std::int32_t page : pages) require(page >= 0 && page < cache.pages, "a page is outside the cache");
      require(adapter >= -1, "an adapter's number is negative");
      has_adapters |= adapter >= 0;
      step.sequences.push_back({pages.data(), start, length, token, is_expanded, adapter});
      token += length;
    }
    for (const Sequence& s : step.sequences) {
      if (has_adapters) step.adapters.insert(step.adapters.end(), s.length, s.adapter);
    }
    require(token == step.tokens, "the sequences do not add up to the tokens");
  }

  std::vector<Array> owners_;
  std::vector<std::vector<Array>> expert_owners_;  // by layer
  std::int64_t head_parts_ = 1;  // processes among which the head's rows are divided
  Model model_;
  ProcessStepState step_state_;
};

}  // namespace

void bind_model(nb::module_& module) {
  nb::class_<BoundNorm>(module, "Norm").def_static("make", make_norm, "weight"_a, "eps"_a);
  nb::class_<BoundLowRank>(module, "LowRank").def_static("make", make_low_rank, "a"_a, "b"_a);
  nb::class_<BoundProjection>(module, "Projection")
      .def_static("make", make_projection, "weight"_a, "bias"_a.none(), "updates"_a);
  nb::class_<BoundMlp>(module, "Mlp").def_static("make", make_mlp, "gate"_a, "up"_a, "down"_a);
  nb::class_<BoundRouter>(module, "Router")
      .def_static("make", make_router, "weight"_a, "bias"_a.none(), nb::kw_only(), "chosen"_a, "groups"_a,
                  "kept_groups"_a, "best_in_group"_a, "is_sigmoid"_a, "normalizes"_a, "scaling"_a);
  nb::class_<BoundMoe>(module, "Moe").def_static("make", make_moe, "router"_a, "experts"_a, "places"_a);
  nb::class_<BoundIndexer>(module, "Indexer")
      .def_static("make", make_indexer, nb::kw_only(), "heads"_a, "rope_dim"_a, "pair_step"_a, "interleave"_a, "q"_a,
                  "k"_a, "k_norm"_a, "k_norm_bias"_a, "weights"_a);
  nb::class_<BoundAttention>(module, "Attention")
      .def_static("mla", make_mla, nb::kw_only(), "heads"_a, "nope_dim"_a, "rope_dim"_a, "value_dim"_a, "scale"_a,
                  "interleave"_a, "q_a"_a.none(), "q_a_norm"_a.none(), "q"_a, "kv_a"_a, "kv_a_norms"_a, "kv_b"_a,
                  "k_b"_a.none(), "o"_a, "kv_b_updates"_a, "topk"_a = 0, "indexer"_a.none() = nb::none())
      .def_static("gqa", make_gqa, nb::kw_only(), "heads"_a, "kv_heads"_a, "head_dim"_a, "scale"_a, "interleave"_a,
                  "window"_a, "q"_a, "k"_a, "v"_a, "o"_a, "q_norm"_a.none(), "k_norm"_a.none());
  nb::class_<BoundLayer>(module, "Layer")
      .def_static("make", make_layer, nb::kw_only(), "input_norm"_a, "post_attention_norm"_a, "attention"_a,
                  "first_pair"_a, "mlp"_a.none(), "moe"_a.none(), "post_mlp_norm"_a.none() = nb::none());
  nb::class_<BoundMtpInput>(module, "MtpInput")
      .def_static("make", make_mtp_input, "embedding_norm"_a, "hidden_norm"_a, "projection"_a);
  nb::class_<BoundModel>(module, "Model")
      .def(nb::init<const std::optional<BoundMatrix>&, const std::optional<BoundMtpInput>&,
                    const std::vector<BoundLayer>&, std::int64_t, const std::optional<BoundNorm>&,
                    const std::optional<BoundProjection>&, bool, float, float, const DivisionArgs&>(),
           nb::kw_only(), "embedding"_a.none(), "mtp_input"_a.none(), "layers"_a, "first_layer"_a, "norm"_a.none(),
           "head"_a.none(),
           "is_larger_than_memory"_a, "embedding_scale"_a = 1.0f, "residual_scale"_a = 1.0f,
           "division"_a = DivisionArgs{1, 1, 0, 1})
      .def("step", &BoundModel::step, nb::kw_only(), "ids"_a, "previous"_a.none(), "slots"_a, "cos"_a, "sin"_a,
           "sequences"_a, "cache"_a, "hidden"_a, "wanted"_a, "logits"_a.none(), "is_decode"_a,
           "query_scale"_a.none() = nb::none(), "exchange"_a.none() = nb::none(),
           "residuals"_a.none() = nb::none(), "experts"_a.none() = nb::none(), "gates"_a.none() = nb::none())
      .def("count_expert_loads", &BoundModel::count_expert_loads)
      .def("expert_loads", &BoundModel::expert_loads)
      .def("place_experts", &BoundModel::place_experts, "layer"_a, "moe"_a);
}

}  // namespace lowlat
