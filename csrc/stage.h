// Per-model step state: the workspace and its mutex, recreated in a forked child.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "pool.h"
#include "workspace.h"

namespace lowlat {

struct Stage {
  explicit Stage(const Model& model) : work(model) {}

  std::mutex mutex;
  Workspace work;
};

// The step state of this process. A forked child abandons its parent's, which may be locked and half written.
class OwnStage {
 public:
  OwnStage() = default;
  ~OwnStage() { leave_to_parent(); }
  OwnStage(const OwnStage&) = delete;
  OwnStage& operator=(const OwnStage&) = delete;

  // Requires the GIL.
  Stage& get(const Model& model) {
    leave_to_parent();
    if (!stage_) stage_ = std::make_unique<Stage>(model);
    return *stage_;
  }

 private:
  void leave_to_parent() {
    if (forks_ == forks()) return;
    static_cast<void>(stage_.release());
    forks_ = forks();
  }

  std::unique_ptr<Stage> stage_;
  std::uint64_t forks_ = forks();
};

}  // namespace lowlat
