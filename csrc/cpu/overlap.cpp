// overlap: what two deltas have in common, per tile: entries, equal signs, and in binary64 the sums
// of a * b, a * a and b * b over the entries in both, by runs of the entries of a.
//
// Moves: idx of both deltas, and the values that both have.
#include "common.h"

namespace sft::SFT_ISA {
namespace {

inline double value_at(int32_t dtype, const void *values, int64_t e) {
  if (dtype == SFT_F32) return static_cast<const float *>(values)[e];
  const uint16_t half = static_cast<const uint16_t *>(values)[e];
  return dtype == SFT_BF16 ? f32_of_bf16(half) : f32_of_f16(half);
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
    int64_t j = ptr_b[t];
    const int64_t end_a = ptr_a[t + 1], end_b = ptr_b[t + 1];
    int64_t both = 0, same_sign = 0;
    double dot[3] = {};
    for (int64_t first = ptr_a[t]; first < end_a && j < end_b; first += SFT_SUM_RUN) {
      const int64_t end = end_a - first < SFT_SUM_RUN ? end_a : first + SFT_SUM_RUN;
      // A merge without branches notes the pairs of a run of a; then their products are summed.
      int64_t pair_a[SFT_SUM_RUN + 1], pair_b[SFT_SUM_RUN + 1];
      int64_t i = first, n = 0;
      while (i < end && j < end_b) {
        const uint16_t a = idx_a[i], b = idx_b[j];
        pair_a[n] = i;
        pair_b[n] = j;
        n += a == b;
        i += a <= b;
        j += b <= a;
      }
      if (n == 0) continue;
      double product[3][SFT_SUM_RUN] = {};
      for (int64_t e = 0; e < n; ++e) {
        const int64_t at = pair_a[e] - first;
        const double a = value_at(dtype_a, val_a, pair_a[e]);
        const double b = value_at(dtype_b, val_b, pair_b[e]);
        same_sign += (a > 0 && b > 0) || (a < 0 && b < 0);
        product[0][at] = a * b;
        product[1][at] = a * a;
        product[2][at] = b * b;
      }
      for (int k = 0; k < 3; ++k)
        dot[k] += run_sum(end - first, [&](int64_t e) { return product[k][e]; });
      both += n;
    }
    counts[2 * t] = both;
    counts[2 * t + 1] = same_sign;
    for (int k = 0; k < 3; ++k) dots[3 * t + k] = dot[k];
  });
  return SFT_OK;
}

}  // namespace sft::SFT_ISA
