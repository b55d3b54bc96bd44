// masked_adamw: one AdamW step (Loshchilov and Hutter, 2019) of the selected entries of a model.
//
//   g = grad / grad_scale;   g = g + l1 * sign(delta);   g = g * clip
//   m = m + (1 - beta1) * (g - m);   v = beta2 * v + ((1 - beta2) * g) * g
//   delta = delta - d * (theta0 + delta)                       d = lr * weight_decay
//   delta = delta + (-a * m) / (sqrt(v) / c2 + eps)            a = lr / c1
//   w = round(theta0 + delta)
//
// Entries outside the support are never written.
// Moves: the lines of g (read) and w (read and written) that hold selected entries; 2 bytes of idx,
// 24 bytes of state and one element of theta0 an entry.
#include "adamw.h"

namespace sft::SFT_ISA {
namespace {

// The moments and delta of n entries, from their gradients; w receives theta0 + delta.
template <bool kDecay>
inline void update(const Scalars &s, float d, int64_t n, const float *__restrict g,
                   float *__restrict m, float *__restrict v, float *__restrict delta,
                   const float *__restrict theta0, float *__restrict w) {
  for (int64_t i = 0; i < n; ++i) {
    const float m_i = m[i] + s.beta1_rest * (g[i] - m[i]);
    const float v_i = s.beta2 * v[i] + (s.beta2_rest * g[i]) * g[i];
    float delta_i = delta[i];
    if (kDecay) delta_i = delta_i - d * (theta0[i] + delta_i);
    delta_i = delta_i + (s.minus_a * m_i) / (__builtin_sqrtf(v_i) / s.c2 + s.eps);
    m[i] = m_i;
    v[i] = v_i;
    delta[i] = delta_i;
    w[i] = theta0[i] + delta_i;
  }
}

// Gradients of n entries after scaling, L1 term and clipping, in place.
inline void prepare(const Scalars &s, int64_t n, const float *__restrict delta,
                    float *__restrict g) {
  if (s.grad_scale) {
    const float scale = *s.grad_scale;
    for (int64_t i = 0; i < n; ++i) g[i] = g[i] / scale;
  }
  if (s.l1 != 0) {
    for (int64_t i = 0; i < n; ++i) g[i] = g[i] + s.l1 * sign(delta[i]);
  }
  if (s.clip) {
    const float clip = *s.clip;
    for (int64_t i = 0; i < n; ++i) g[i] = g[i] * clip;
  }
}

}  // namespace

int32_t masked_adamw(const sft_tiles *w, const uint16_t *idx, const int64_t *ptr, const float *grad,
                     const sft_tiles *grads, float *exp_avg, float *exp_avg_sq, float *delta,
                     const void *theta0, float *step, const double *lr, double beta1, double beta2,
                     double eps, double weight_decay, float l1, const float *grad_scale,
                     const float *found_inf, const float *clip, int32_t threads) {
  if (!valid_tiles(w) || !ptr || !step || !lr) return SFT_BAD_ARGUMENT;
  if (!grad && grads && (!valid_tiles(grads) || grads->n != w->n)) return SFT_BAD_ARGUMENT;
  const int64_t nnz = ptr[w->n];
  if (nnz > 0 && (!idx || !exp_avg || !exp_avg_sq || !delta || !theta0 || (!grad && !grads))) {
    return SFT_BAD_ARGUMENT;
  }
  const int32_t dtype = w->n > 0 ? w->dtype[0] : SFT_F32;
  if (!known_dtype(dtype)) return SFT_BAD_ARGUMENT;
  for (int64_t t = 0; t < w->n; ++t) {
    if (w->dtype[t] != dtype) return SFT_BAD_ARGUMENT;
  }
  if (found_inf && *found_inf != 0) return SFT_OK;

  const IeeeMode ieee;
  const Scalars s(*step, *lr, beta1, beta2, eps, l1, grad_scale, clip);
  const float d = static_cast<float>(*lr * weight_decay);
  const bool decay = weight_decay != 0;
  *step = static_cast<float>(s.t);

  with_dtype(dtype, [&](auto type) {
    using Type = decltype(type);
    using Raw = typename Type::Raw;
    for_each(w->n, threads, nnz, [&](int64_t t, int32_t) {
      Raw *weights = address<Type>(w->base[t]);
      const int64_t begin = ptr[t], end = ptr[t + 1];
      for_blocks(begin, end, [&](int64_t e, int64_t n) {
        float g[kBlock], start[kBlock], sum[kBlock];
        Raw rounded[kBlock];
        fetch_ahead(weights, idx, begin, e, end);
        if (grad) {
          memcpy(g, grad + e, static_cast<size_t>(n) * sizeof(float));
        } else if (!grads->base[t]) {
          memset(g, 0, sizeof(g));
        } else {
          with_dtype(grads->dtype[t], [&](auto grad_type) {
            using GradType = decltype(grad_type);
            gather_floats<GradType>(address<GradType>(grads->base[t]), idx, begin, e, end, n, g);
          });
        }
        prepare(s, n, delta + e, g);
        const float *origin = as_floats(dtype, theta0, e, n, start);
        (decay ? update<true> : update<false>)(s, d, n, g, exp_avg + e, exp_avg_sq + e, delta + e,
                                               origin, sum);
        Type::store(sum, n, rounded);
        scatter_raw(rounded, idx + e, n, weights);
      });
    });
  });
  return SFT_OK;
}

}  // namespace sft::SFT_ISA
