#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#ifdef LOWLAT_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern "C" {
#ifdef LOWLAT_HAS_AMX
extern const lowlat::Ops lowlat_ops_amx;
#endif
#ifdef LOWLAT_HAS_AVX512
extern const lowlat::Ops lowlat_ops_avx512;
#endif
#ifdef LOWLAT_HAS_AVX2
extern const lowlat::Ops lowlat_ops_avx2;
#endif
#ifdef LOWLAT_HAS_NEON
extern const lowlat::Ops lowlat_ops_neon;
#endif
extern const lowlat::Ops lowlat_ops_portable;
}

namespace lowlat {

namespace {

struct Level {
  const Ops* ops;
  bool (*runs_here)();
};

#if defined(LOWLAT_HAS_AVX512) || defined(LOWLAT_HAS_AMX)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#ifdef LOWLAT_HAS_AMX
// AMX needs the processor (cpuid leaf 7: AMX-BF16 is bit 22 of edx, AMX-TILE 24, AMX-INT8 25) and Linux's permission for
// this process to use the tile state, requested once as feature 18 (arch_prctl).
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kNeeded = (1u << 22) | (1u << 24) | (1u << 25);
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return (d & kNeeded) == kNeeded && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// __builtin_cpu_supports queries cpuid and, for vector registers, whether the operating system saves them.
constexpr Level kLevels[] = {
#ifdef LOWLAT_HAS_AMX
    {&lowlat_ops_amx, has_amx},
#endif
#ifdef LOWLAT_HAS_AVX512
    {&lowlat_ops_avx512, has_avx512},
#endif
#ifdef LOWLAT_HAS_AVX2
    {&lowlat_ops_avx2,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     }},
#endif
#ifdef LOWLAT_HAS_NEON
    {&lowlat_ops_neon, [] { return true; }},  // every 64-bit ARM processor has it
#endif
    {&lowlat_ops_portable, [] { return true; }},
};

const Ops* best() {
  for (const Level& level : kLevels) {
    if (level.runs_here()) return level.ops;
  }
  return &lowlat_ops_portable;
}

std::atomic<const Ops*>& in_use() {
  static std::atomic<const Ops*> chosen{best()};
  return chosen;
}

}  // namespace

std::vector<std::string> built_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) names.emplace_back(level.ops->name);
  return names;
}

std::vector<std::string> usable_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels) {
    if (level.runs_here()) names.emplace_back(level.ops->name);
  }
  return names;
}

const Ops& ops(std::string_view name) {
  if (name.empty()) return *in_use().load();
  for (const Level& level : kLevels) {
    if (name == level.ops->name && level.runs_here()) return *level.ops;
  }
  throw std::invalid_argument("no level " + std::string(name) + " on this machine");
}

void set_level(const std::string& level) { in_use().store(&ops(level)); }

}  // namespace lowlat
