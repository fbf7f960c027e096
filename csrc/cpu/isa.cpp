#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastllm {
namespace {

struct Entry {
  const char* name;
  Level level;
  bool usable;
};

#if defined(__x86_64__)

// The register states that the operating system saves on a context switch.
uint64_t saved_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

// Linux hands out the tile registers only to a process that asks.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false;
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
    constexpr uint32_t kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;
    constexpr uint32_t kAvx512Bf16 = 1u << 5, kVnni = 1u << 11, kAmx = kAmxBf16 | kAmxTile | kAmxInt8;
    constexpr uint64_t kTileStates = 3u << 17;
    const bool vnni = c & kVnni, tiles = (d & kAmx) == kAmx && (states & kTileStates) == kTileStates;
    if (!avx512 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return;
    avx512_bf16 = vnni && (a & kAvx512Bf16);
    amx = avx512_bf16 && tiles && tiles_granted();
  }
};

#endif

const std::vector<Entry>& levels() {
  static const std::vector<Entry> all = [] {
    bool avx2 = false, avx512 = false, avx512_bf16 = false, amx = false, neon = false;
#if defined(__x86_64__)
    const Features has;
    avx2 = has.avx2;
    avx512 = has.avx512;
    avx512_bf16 = has.avx512_bf16;
    amx = has.amx;
#elif defined(__aarch64__)
    neon = true;
#endif
    return std::vector<Entry>{{"scalar", kScalar, true},
                              {"avx2", kAvx2, avx2},
                              {"avx512", kAvx512, avx512},
                              {"avx512_bf16", kAvx512Bf16, avx512_bf16},
                              {"amx", kAmx, amx},
                              {"neon", kNeon, neon}};
  }();
  return all;
}

std::atomic<const Entry*> current{nullptr};

const Entry* find_level(const std::string& name, const std::string& who) {
  std::string usable;
  bool known = false;
  for (const Entry& entry : levels()) {
    if (entry.name == name && entry.usable) return &entry;
    known = known || entry.name == name;
    if (entry.usable) usable += (usable.empty() ? "" : ", ") + std::string(entry.name);
  }
  const std::string why = known ? "cannot run on this machine" : "is not a CPU level";
  throw std::invalid_argument(who + ": '" + name + "' " + why + "; available here: " + usable);
}

}  // namespace

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const Entry& entry : levels())
    if (entry.usable) names.emplace_back(entry.name);
  return names;
}

void init_isa() {
  const char* wish = std::getenv("FASTLLM_CPU_ISA");
  if (wish && *wish) {
    current = find_level(wish, "FASTLLM_CPU_ISA");
    return;
  }
  for (const Entry& entry : levels())
    if (entry.usable) current = &entry;
}

std::string isa() { return current.load()->name; }

void set_isa(const std::string& name) { current = find_level(name, "set_isa"); }

Level level() { return current.load(std::memory_order_relaxed)->level; }

}  // namespace fastllm
