// Per-model step state: the workspace and its mutex, recreated in a forked child.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "thread_pool.h"
#include "workspace.h"

namespace lowlat {

struct StepState {
  explicit StepState(const Model& model) : work(model) {}

  std::mutex mutex;
  Workspace work;
};

// The step state of this process. A forked child abandons its parent's, which may be locked and half written.
class ProcessStepState {
 public:
  ProcessStepState() = default;
  ~ProcessStepState() { leave_to_parent(); }
  ProcessStepState(const ProcessStepState&) = delete;
  ProcessStepState& operator=(const ProcessStepState&) = delete;

  // Requires the GIL.
  StepState& get(const Model& model) {
    leave_to_parent();
    if (!step_state_) step_state_ = std::make_unique<StepState>(model);
    return *step_state_;
  }

 private:
  void leave_to_parent() {
    if (forks_ == forks()) return;
    static_cast<void>(step_state_.release());
    forks_ = forks();
  }

  std::unique_ptr<StepState> step_state_;
  std::uint64_t forks_ = forks();
};

}  // namespace lowlat
