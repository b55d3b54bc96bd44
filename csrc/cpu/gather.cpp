// gather: the compact binary32 gradient of the selected entries, and its squared norm.
//
//   out = g[idx], or out + g[idx];   out = out / grad_scale;   out = out + l1 * sign(delta)
//
// Moves: the lines of g that hold selected entries; 2 bytes of idx and 4 to 12 bytes an entry.
#include "common.h"

namespace sft::SFT_ISA {
namespace {

// Adds the squares of x[0 … n) to the lanes, and says whether all values are finite. x starts at a
// multiple of 16 entries of its tile.
inline bool add_squares(const float *x, int64_t n, Lanes *lanes) {
  uint32_t largest = 0;
  double sum[16];
  memcpy(sum, lanes->sum, sizeof(sum));
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    for (int j = 0; j < 16; ++j) {
      const double value = x[i + j];
      sum[j] += value * value;
    }
  }
  for (int j = 0; i + j < n; ++j) {
    const double value = x[i + j];
    sum[j] += value * value;
  }
  memcpy(lanes->sum, sum, sizeof(sum));
  for (i = 0; i < n; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
    largest = largest > magnitude ? largest : magnitude;
  }
  return largest < 0x7F800000;
}

}  // namespace

int32_t gather(const sft_tiles *grads, int64_t n_tiles, const uint16_t *idx, const int64_t *ptr,
               float *out, const float *grad_scale, int32_t accumulate, const float *delta,
               float l1, double *partials, double *norm_sq, float *found_inf, int32_t threads) {
  if (n_tiles < 0 || !ptr || !norm_sq || !found_inf || (n_tiles > 0 && !partials)) {
    return SFT_BAD_ARGUMENT;
  }
  if (grads && (!valid_tiles(grads) || grads->n != n_tiles)) return SFT_BAD_ARGUMENT;
  const int64_t nnz = ptr[n_tiles];
  if (nnz > 0 && (!idx || !out)) return SFT_BAD_ARGUMENT;

  int64_t not_finite = 0;
  for_each(n_tiles, threads, nnz, [&](int64_t t, int32_t) {
    Lanes lanes;
    const int64_t begin = ptr[t], end = ptr[t + 1];
    for_blocks(begin, end, [&](int64_t e, int64_t n) {
      const size_t bytes = static_cast<size_t>(n) * sizeof(float);
      float *x = out + e;
      if (grads) {
        float g[kBlock] = {};
        if (grads->base[t]) {
          with_dtype(grads->dtype[t], [&](auto type) {
            using Type = decltype(type);
            gather_floats<Type>(address<Type>(grads->base[t]), idx, begin, e, end, n, g);
          });
        }
        if (accumulate) {
          for (int64_t i = 0; i < n; ++i) x[i] = x[i] + g[i];
        } else {
          memcpy(x, g, bytes);
        }
      } else if (!accumulate) {
        memset(x, 0, bytes);
      }
      if (grad_scale) {
        const float scale = *grad_scale;
        for (int64_t i = 0; i < n; ++i) x[i] = x[i] / scale;
      }
      if (delta) {
        for (int64_t i = 0; i < n; ++i) x[i] = x[i] + l1 * sign(delta[e + i]);
      }
      if (!add_squares(x, n, &lanes)) __atomic_store_n(&not_finite, 1, __ATOMIC_RELAXED);
    });
    partials[t] = lanes.total();
  });
  const IeeeMode ieee;
  *norm_sq = sum_in_order(partials, n_tiles);
  *found_inf = not_finite ? 1.0f : 0.0f;
  return SFT_OK;
}

}  // namespace sft::SFT_ISA
