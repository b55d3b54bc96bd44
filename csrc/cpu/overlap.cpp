// overlap: what two deltas have in common, per tile: entries, equal signs, and in binary64 the sums
// of a * b, a * a and b * b over the entries in both, by runs of the entries of a.
//
// Moves: idx of both deltas, and the values that both have.
#include "common.h"

namespace sft::SFT_ISA {
namespace {

// The entries of a tile: one bit each, and how many lie before each 64 of them.
struct Positions {
  uint64_t word[SFT_TILE / 64];
  uint16_t before[SFT_TILE / 64];

  Positions(const uint16_t *idx, int64_t n) {
    memset(word, 0, sizeof(word));
    for (int64_t j = 0; j < n; ++j) word[idx[j] / 64] |= 1ull << idx[j] % 64;
    int64_t sum = 0;
    for (int64_t i = 0; i < SFT_TILE / 64; ++i) {
      before[i] = static_cast<uint16_t>(sum);
      sum += __builtin_popcountll(word[i]);
    }
  }

  bool has(uint16_t at) const { return word[at / 64] >> at % 64 & 1; }

  // How many entries lie before `at`.
  int64_t rank(uint16_t at) const {
    return before[at / 64] + __builtin_popcountll(word[at / 64] & ((1ull << at % 64) - 1));
  }
};

inline float value_at(int32_t dtype, const void *values, int64_t e) {
  if (dtype == SFT_F32) return static_cast<const float *>(values)[e];
  const uint16_t half = static_cast<const uint16_t *>(values)[e];
  return dtype == SFT_BF16 ? f32_of_bf16(half) : f32_of_f16(half);
}

// The sum of a run whose first halving has been done.
constexpr int64_t kHalf = SFT_SUM_RUN / 2;
inline double sum_of_half(const double *half) {
  double x[kHalf / 8], y[kHalf / 64];
  halve_thrice(kHalf / 8, [&](int64_t i) { return half[i]; }, x);
  halve_thrice(kHalf / 64, [&](int64_t i) { return x[i]; }, y);
  return halve_to_one(y, kHalf / 64);
}

}  // namespace

int32_t overlap(int64_t n_tiles, const uint16_t *idx_a, const int64_t *ptr_a, const void *val_a,
                int32_t dtype_a, const uint16_t *idx_b, const int64_t *ptr_b, const void *val_b,
                int32_t dtype_b, int64_t *counts, double *dots, int32_t threads) {
  if (n_tiles < 0 || !ptr_a || !ptr_b || !known_dtype(dtype_a) || !known_dtype(dtype_b) ||
      (n_tiles > 0 && (!counts || !dots))) {
    return SFT_BAD_ARGUMENT;
  }
  const int64_t nnz_a = ptr_a[n_tiles], nnz_b = ptr_b[n_tiles];
  if ((nnz_a > 0 && (!idx_a || !val_a)) || (nnz_b > 0 && (!idx_b || !val_b))) {
    return SFT_BAD_ARGUMENT;
  }
  for_each(n_tiles, threads, nnz_a + nnz_b, [&](int64_t t, int32_t) {
    const int64_t end_a = ptr_a[t + 1], begin_b = ptr_b[t], end_b = ptr_b[t + 1];
    int64_t both = 0, same_sign = 0;
    double dot[3] = {};
    if (ptr_a[t] < end_a && begin_b < end_b) {
      const Positions in_b(idx_b + begin_b, end_b - begin_b);
      for (int64_t first = ptr_a[t]; first < end_a; first += SFT_SUM_RUN) {
        const int64_t length = end_a - first < SFT_SUM_RUN ? end_a - first : SFT_SUM_RUN;
        // Which entries of the run b has, too, without branches.
        uint16_t pair[SFT_SUM_RUN + 1];
        int64_t n = 0;
        for (int64_t i = 0; i < length; ++i) {
          pair[n] = static_cast<uint16_t>(i);
          n += in_b.has(idx_a[first + i]);
        }
        if (n == 0) continue;
        // Sums of two values have no order: the first halving needs no array of its own.
        double half[3][kHalf] = {};
        for (int64_t e = 0; e < n; ++e) {
          const int64_t i = first + pair[e], j = begin_b + in_b.rank(idx_a[i]),
                        at = pair[e] % kHalf;
          const double a = value_at(dtype_a, val_a, i), b = value_at(dtype_b, val_b, j);
          same_sign += ((a > 0) & (b > 0)) | ((a < 0) & (b < 0));
          half[0][at] += a * b;
          half[1][at] += a * a;
          half[2][at] += b * b;
        }
        for (int k = 0; k < 3; ++k) dot[k] += sum_of_half(half[k]);
        both += n;
      }
    }
    counts[2 * t] = both;
    counts[2 * t + 1] = same_sign;
    for (int k = 0; k < 3; ++k) dots[3 * t + k] = dot[k];
  });
  return SFT_OK;
}

}  // namespace sft::SFT_ISA
