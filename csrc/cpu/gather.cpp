// gather: the compact binary32 gradient of the selected entries, and its squared norm.
//
//   out = g[idx], or out + g[idx];   out = out / grad_scale;   out = out + l1 * sign(delta)
//
// Moves: the lines of g that hold selected entries; 2 bytes of idx and 4 to 12 bytes an entry.
#include "common.h"

namespace sft::SFT_ISA {
namespace {

// Threads take the entries by whole runs of the sum, wherever the tiles begin; each run is summed as
// soon as it is complete, while it lies in the first-level cache.
constexpr int64_t kMaxChunk = 32 * SFT_SUM_RUN, kMinChunk = 4 * SFT_SUM_RUN;

// The tile of entry e: the last one that begins at or before it.
inline int64_t tile_of(const int64_t *ptr, int64_t n_tiles, int64_t e) {
  int64_t low = 0, high = n_tiles;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (ptr[middle] <= e ? low : high) = middle;
  }
  return low;
}

inline double sum_of_squares(const float *x, int64_t n) {
  return run_sum(n, [&](int64_t i) {
    const double value = x[i];
    return value * value;
  });
}

}  // namespace

int32_t gather(const sft_tiles *grads, int64_t n_tiles, const uint16_t *idx, const int64_t *ptr,
               float *out, const float *grad_scale, int32_t accumulate, const float *delta,
               float l1, double *partials, double *norm_sq, float *found_inf, int32_t threads) {
  if (n_tiles < 0 || !ptr || !norm_sq || !found_inf) return SFT_BAD_ARGUMENT;
  if (grads && (!valid_tiles(grads) || grads->n != n_tiles)) return SFT_BAD_ARGUMENT;
  const int64_t nnz = ptr[n_tiles];
  if (nnz > 0 && (!idx || !out || !partials)) return SFT_BAD_ARGUMENT;

  int64_t chunk = kMaxChunk;
  while (chunk > kMinChunk && nnz / chunk < int64_t{4} * threads) chunk /= 2;
  for_each((nnz + chunk - 1) / chunk, threads, nnz, [&](int64_t c, int32_t) {
    const int64_t first = c * chunk;
    const int64_t last = nnz - first < chunk ? nnz : first + chunk;
    int64_t summed = first;
    for (int64_t t = tile_of(ptr, n_tiles, first); t < n_tiles && ptr[t] < last; ++t) {
      const int64_t begin = ptr[t] > first ? ptr[t] : first;
      const int64_t end = ptr[t + 1] < last ? ptr[t + 1] : last;
      for_blocks(begin, end, [&](int64_t e, int64_t n) {
        const size_t bytes = static_cast<size_t>(n) * sizeof(float);
        float *x = out + e;
        float buffer[kBlock];
        float *g = accumulate ? buffer : x;
        if (grads && grads->base[t]) {
          with_dtype(grads->dtype[t], [&](auto type) {
            using Type = decltype(type);
            gather_floats<Type>(address<Type>(grads->base[t]), idx, begin, e, end, n, g);
          });
        } else if (grads || !accumulate) {
          memset(g, 0, bytes);
        }
        if (grads && accumulate) {
          for (int64_t i = 0; i < n; ++i) x[i] = x[i] + g[i];
        }
        if (grad_scale) {
          const float scale = *grad_scale;
          for (int64_t i = 0; i < n; ++i) x[i] = x[i] / scale;
        }
        if (delta) {
          for (int64_t i = 0; i < n; ++i) x[i] = x[i] + l1 * sign(delta[e + i]);
        }
        for (; summed + SFT_SUM_RUN <= e + n; summed += SFT_SUM_RUN) {
          partials[summed / SFT_SUM_RUN] = sum_of_squares(out + summed, SFT_SUM_RUN);
        }
      });
    }
    if (summed < last) partials[summed / SFT_SUM_RUN] = sum_of_squares(out + summed, last - summed);
  });
  const IeeeMode ieee;
  *norm_sq = tree_sum(partials, (nnz + SFT_SUM_RUN - 1) / SFT_SUM_RUN);
  *found_inf = __builtin_isfinite(*norm_sq) ? 0.0f : 1.0f;
  return SFT_OK;
}

}  // namespace sft::SFT_ISA
