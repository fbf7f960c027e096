#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastllm {
namespace {

struct Level {
  const char* name;
  const Kernels* table;
  bool usable;
};

#if defined(__x86_64__)

// The register states that the operating system saves on a context switch.
uint64_t saved_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

struct Features {
  bool avx2 = false, avx512 = false;
  Features() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool osxsave = c & bit_OSXSAVE;
    const bool base = (c & bit_AVX) && (c & bit_FMA) && (c & bit_F16C);
    if (!osxsave || !base || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const uint64_t ymm = 0x6, zmm = 0xe6, states = saved_states();
    avx2 = (states & ymm) == ymm && (b & bit_AVX2);
    const uint32_t wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
    avx512 = avx2 && (states & zmm) == zmm && (b & wanted) == wanted;
  }
};

#endif

const std::vector<Level>& levels() {
  static const std::vector<Level> all = [] {
    std::vector<Level> found = {{"scalar", &kernels_scalar, true}};
#if defined(__x86_64__)
    const Features has;
    found.push_back({"avx2", &kernels_avx2, has.avx2});
    found.push_back({"avx512", &kernels_avx512, has.avx512});
    found.push_back({"neon", nullptr, false});
#elif defined(__aarch64__)
    found.push_back({"avx2", nullptr, false});
    found.push_back({"avx512", nullptr, false});
    found.push_back({"neon", &kernels_neon, true});
#else
    for (const char* name : {"avx2", "avx512", "neon"}) found.push_back({name, nullptr, false});
#endif
    return found;
  }();
  return all;
}

std::atomic<const Level*> current{nullptr};

const Level* find_level(const std::string& name, const std::string& who) {
  std::string usable;
  bool known = false;
  for (const Level& level : levels()) {
    if (level.name == name && level.usable) return &level;
    known = known || level.name == name;
    if (level.usable) usable += (usable.empty() ? "" : ", ") + std::string(level.name);
  }
  const std::string why = known ? "cannot run on this machine" : "is not a CPU level";
  throw std::invalid_argument(who + ": '" + name + "' " + why + "; available here: " + usable);
}

}  // namespace

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels())
    if (level.usable) names.emplace_back(level.name);
  return names;
}

void init_isa() {
  const char* wish = std::getenv("FASTLLM_CPU_ISA");
  if (wish && *wish) {
    current = find_level(wish, "FASTLLM_CPU_ISA");
    return;
  }
  for (const Level& level : levels())
    if (level.usable) current = &level;
}

std::string isa() { return current.load()->name; }

void set_isa(const std::string& name) { current = find_level(name, "set_isa"); }

const Kernels& kernels() { return *current.load(std::memory_order_relaxed)->table; }

}  // namespace fastllm
