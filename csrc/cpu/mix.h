// The 64-bit mixing function of select_random and digest: the finaliser of SplitMix64 (Steele, Lea
// and Flood, 2014).
#ifndef SPARSE_FT_CPU_MIX_H
#define SPARSE_FT_CPU_MIX_H

#include "common.h"

namespace sft::SFT_ISA {
namespace {

constexpr uint64_t kPosition = 0x9E3779B97F4A7C15;
constexpr uint64_t kPayload = 0xD1342543DE82EF95;

inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

}  // namespace
}  // namespace sft::SFT_ISA

#endif
