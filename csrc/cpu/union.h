// The union of the entries of several deltas, tile by tile: what merge and reduce share.
#ifndef SPARSE_FT_CPU_UNION_H
#define SPARSE_FT_CPU_UNION_H

#include "common.h"

namespace sft::SFT_ISA {
namespace {

// The entries of a tile that lie in any delta: one bit each (8 KB), and how many lie before each 64.
// The latter give an entry's place in the result without a comparison that a processor must guess.
struct Union {
  static constexpr int64_t kWords = SFT_TILE / 64;
  uint64_t word[kWords] = {};
  uint16_t before[kWords];

  Union(int64_t t, int32_t n_deltas, const uint16_t *const *idx, const int64_t *const *ptr) {
    for (int32_t j = 0; j < n_deltas; ++j) set_bits(idx[j] + ptr[j][t], ptr[j][t + 1] - ptr[j][t]);
  }

  // In four places at a time: neighbours often share a word, and would wait for each other.
  void set_bits(const uint16_t *idx, int64_t n) {
    const int64_t quarter = n / 4;
    for (int64_t i = 0; i < quarter; ++i) {
      for (int64_t k = 0; k < 4; ++k) set_bit(idx[i + k * quarter]);
    }
    for (int64_t i = 4 * quarter; i < n; ++i) set_bit(idx[i]);
  }

  void set_bit(uint16_t at) { word[at / 64] |= 1ull << at % 64; }

  int64_t count() const {
    int64_t sum = 0;
    for (const uint64_t bits : word) sum += __builtin_popcountll(bits);
    return sum;
  }

  // Makes place() work; returns count().
  int64_t rank() {
    int64_t sum = 0;
    for (int64_t i = 0; i < kWords; ++i) {
      before[i] = static_cast<uint16_t>(sum);
      sum += __builtin_popcountll(word[i]);
    }
    return sum;
  }

  int64_t place(uint16_t at) const {
    return before[at / 64] + __builtin_popcountll(word[at / 64] & ((1ull << at % 64) - 1));
  }
};

constexpr int32_t kNone = -1, kSeveral = -2;

// The delta that alone has entries in a tile, or kNone, or kSeveral.
inline int32_t only_delta(int64_t t, int32_t n_deltas, const int64_t *const *ptr) {
  int32_t only = kNone;
  for (int32_t j = 0; j < n_deltas; ++j) {
    if (ptr[j][t] < ptr[j][t + 1]) only = only == kNone ? j : kSeveral;
    if (only == kSeveral) break;
  }
  return only;
}

// Whether the lists are there; nnz receives the entries in all.
inline bool valid_deltas(int64_t n_tiles, int32_t n_deltas, const uint16_t *const *idx,
                         const int64_t *const *ptr, int64_t *nnz) {
  if (n_tiles < 0 || n_deltas < 0 || (n_deltas > 0 && (!idx || !ptr))) return false;
  *nnz = 0;
  for (int32_t j = 0; j < n_deltas; ++j) {
    if (!ptr[j] || (ptr[j][n_tiles] > 0 && !idx[j])) return false;
    *nnz += ptr[j][n_tiles];
  }
  return true;
}

}  // namespace
}  // namespace sft::SFT_ISA

#endif
