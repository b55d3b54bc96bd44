// anchor_l1: the L1 term toward an anchor, for dense gradients (Ansell et al., 2022, section 3.2).
//
//   g = round(g + coeff * sign(w - anchor));   total = sum of |w - anchor|
//
// Moves: w and anchor once; g once in and once out.
#include "common.h"

namespace sft::SFT_ISA {
namespace {

constexpr int64_t kStrip = SFT_SUM_RUN;

}  // namespace

int32_t anchor_l1(const sft_tiles *grads, const sft_tiles *w, const sft_tiles *anchors, float coeff,
                  double *partials, double *total, int32_t threads) {
  if (!valid_tiles(w) || !valid_tiles(anchors) || anchors->n != w->n || !total ||
      (w->n > 0 && !partials) || (grads && (!valid_tiles(grads) || grads->n != w->n))) {
    return SFT_BAD_ARGUMENT;
  }
  for (int64_t t = 0; t < w->n; ++t) {
    if (!known_dtype(w->dtype[t]) || !known_dtype(anchors->dtype[t]) ||
        (grads && grads->base[t] && !known_dtype(grads->dtype[t]))) {
      return SFT_BAD_ARGUMENT;
    }
  }
  for_each(w->n, threads, w->n * SFT_TILE, [&](int64_t t, int32_t) {
    double tile_sum = 0;
    for (int64_t first = 0; first < w->length[t]; first += kStrip) {
      const int64_t left = w->length[t] - first;
      const int64_t n = left < kStrip ? left : kStrip;
      float w_buffer[kStrip], anchor_buffer[kStrip], moved[kStrip];
      const float *x = as_floats(w->dtype[t], address<F32>(w->base[t]), first, n, w_buffer);
      const float *y =
          as_floats(anchors->dtype[t], address<F32>(anchors->base[t]), first, n, anchor_buffer);
      for (int64_t i = 0; i < n; ++i) moved[i] = x[i] - y[i];
      tile_sum += run_sum(n, [&](int64_t i) {
        return static_cast<double>(float_of(bits_of(moved[i]) & 0x7FFFFFFF));
      });
      if (!grads || !grads->base[t]) continue;
      with_dtype(grads->dtype[t], [&](auto type) {
        using Type = decltype(type);
        typename Type::Raw *g = address<Type>(grads->base[t]) + first;
        float buffer[kStrip];
        Type::load(g, n, buffer);
        for (int64_t e = 0; e < n; ++e) buffer[e] = buffer[e] + coeff * sign(moved[e]);
        Type::store(buffer, n, g);
      });
    }
    partials[t] = tile_sum;
  });
  const IeeeMode ieee;
  *total = tree_sum(partials, w->n);
  return SFT_OK;
}

}  // namespace sft::SFT_ISA
