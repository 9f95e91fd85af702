// Which instruction set this CPU and its operating system offer.
#include <atomic>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
extern const ggpass::Isa ggpass_isa_avx2, ggpass_isa_avx2_zen, ggpass_isa_avx512, ggpass_isa_portable_x86;
#else
extern const ggpass::Isa ggpass_isa_neon, ggpass_isa_portable_arm;
#endif

namespace ggpass {
namespace {

struct Candidate {
  const Isa *isa;
  bool usable;
};

#if defined(__x86_64__)

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;

  Registers(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d); }
};

// The register state that the operating system saves for a thread: without it the instructions fault.
unsigned saved_state() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

constexpr bool all(unsigned value, unsigned mask) { return (value & mask) == mask; }

// Best first; the last one runs anywhere. The sets are those of ggpass/kernels/isa.py.
const Candidate *candidates() {
  static const auto list = [] {
    const Registers basic(1, 0), seven(7, 0), extended(0x80000001, 0), vendor(0, 0);
    constexpr unsigned fma = 1u << 12, movbe = 1u << 22, osxsave = 1u << 27, f16c = 1u << 29, lzcnt = 1u << 5;
    constexpr unsigned avx2 = 1u << 5, bmi2 = 1u << 8;
    constexpr unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31;  // F, DQ, CD, BW, VL
    constexpr unsigned vaes = 1u << 9;
    const unsigned state = all(basic.c, osxsave) ? saved_state() : 0;
    const bool level3 = all(basic.c, fma | movbe | f16c) && all(seven.b, avx2 | bmi2) && all(extended.c, lzcnt) &&
                        all(state, 0x6);
    const bool level4 = level3 && all(seven.b, avx512) && all(state, 0xe6);
    const bool amd = vendor.b == 0x68747541;  // "Auth"enticAMD
    struct List {
      Candidate of[5];
    };
    return List{{{&ggpass_isa_avx512, level4},
                 {&ggpass_isa_avx2_zen, level3 && amd && all(seven.c, vaes)},
                 {&ggpass_isa_avx2, level3},
                 {&ggpass_isa_portable_x86, true},
                 {nullptr, false}}};
  }();
  return list.of;
}

#else

const Candidate *candidates() {
  static const Candidate list[] = {{&ggpass_isa_neon, true}, {&ggpass_isa_portable_arm, true}, {nullptr, false}};
  return list;
}

#endif

const Isa *best() {
  const Candidate *candidate = candidates();
  while (!candidate->usable) candidate++;
  return candidate->isa;
}

std::atomic<const Isa *> chosen{nullptr};

}  // namespace

const Isa &isa() {
  const Isa *known = chosen.load(std::memory_order_relaxed);
  if (known == nullptr) chosen.store(known = best(), std::memory_order_relaxed);
  return *known;
}

}  // namespace ggpass

// For tests and measurements: run the named set from now on (null: the best). Returns the name of the set in use,
// or null, with nothing changed, where this machine cannot run the named one or there is none of that name.
extern "C" __attribute__((visibility("default"))) const char *ggpass_onnxruntime_use_isa(const char *name) {
  using namespace ggpass;
  const Isa *found = name == nullptr ? best() : nullptr;
  for (const Candidate *one = candidates(); found == nullptr && one->isa != nullptr; one++)
    if (one->usable && std::strcmp(one->isa->name, name) == 0) found = one->isa;
  if (found != nullptr) chosen.store(found, std::memory_order_relaxed);
  return found == nullptr ? nullptr : found->name;
}
