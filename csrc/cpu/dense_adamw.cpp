// dense_adamw: one AdamW step (Loshchilov and Hutter, 2019) of every entry of a model, with the L1
// term toward an anchor (Ansell et al., 2022, section 3.2).
//
//   x = master, or the weight;   g = grad / grad_scale;   g = g + l1 * sign(x - anchor);   g = g * clip
//   m = m + (1 - beta1) * (g - m);   v = beta2 * v + ((1 - beta2) * g) * g
//   x = x * (1 - lr * weight_decay);   x = x + (-a * m) / (sqrt(v) / c2 + eps);   w = round(x)
//
// A tensor without a gradient is left alone.
// Moves: the gradient and the anchor once; moments, master and weight once in and once out.
#include "adamw.h"

namespace sft::SFT_ISA {
namespace {

// The moments and x of n entries, from their gradients.
template <bool kDecay>
inline void update(const Scalars &s, float keep, int64_t n, const float *__restrict g,
                   float *__restrict m, float *__restrict v, float *__restrict x) {
  for (int64_t i = 0; i < n; ++i) {
    const float m_i = m[i] + s.beta1_rest * (g[i] - m[i]);
    const float v_i = s.beta2 * v[i] + (s.beta2_rest * g[i]) * g[i];
    const float x_i = kDecay ? x[i] * keep : x[i];
    m[i] = m_i;
    v[i] = v_i;
    x[i] = x_i + (s.minus_a * m_i) / (__builtin_sqrtf(v_i) / s.c2 + s.eps);
  }
}

// Master bits = (weight bits << 16) + low, low read as signed; all modulo 2^32.
inline void join(const uint16_t *__restrict w, const uint16_t *__restrict low, int64_t n,
                 float *__restrict x) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t below = static_cast<uint32_t>(static_cast<int16_t>(low[i]));
    x[i] = float_of((static_cast<uint32_t>(w[i]) << 16) + below);
  }
}

// The weight is the nearest bfloat16, ties away from zero: what is left then fits 16 signed bits.
inline void split(const float *__restrict x, int64_t n, uint16_t *__restrict w,
                  uint16_t *__restrict low) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(x[i]);
    w[i] = static_cast<uint16_t>((bits + 0x8000) >> 16);
    low[i] = static_cast<uint16_t>(bits);
  }
}

// Tiles of one data type, as many as n.
inline bool alike(const sft_tiles *tiles, int64_t n) {
  if (!valid_tiles(tiles) || tiles->n != n) return false;
  for (int64_t t = 0; t < n; ++t) {
    if (tiles->dtype[t] != tiles->dtype[0]) return false;
  }
  return n == 0 || known_dtype(tiles->dtype[0]);
}

inline bool all_known(const sft_tiles *tiles, int64_t n) {
  if (!valid_tiles(tiles) || tiles->n != n) return false;
  for (int64_t t = 0; t < n; ++t) {
    if (tiles->base[t] && !known_dtype(tiles->dtype[t])) return false;
  }
  return true;
}

// n values of one state from `first` on, to be changed: in place where they are binary32, else
// copied into buffer.
inline float *editable(int32_t dtype, int64_t base, int64_t first, int64_t n, float *buffer) {
  return const_cast<float *>(as_floats(dtype, address<F32>(base), first, n, buffer));
}

}  // namespace

int32_t dense_adamw(const sft_tiles *w, const sft_tiles *grads, const sft_tiles *exp_avg,
                    const sft_tiles *exp_avg_sq, const sft_tiles *master, int32_t master_kind,
                    const sft_tiles *anchors, float *step, const double *lr, double beta1,
                    double beta2, double eps, double weight_decay, float l1,
                    const float *grad_scale, const float *found_inf, const float *clip,
                    int32_t threads) {
  if (!valid_tiles(w) || !step || !lr) return SFT_BAD_ARGUMENT;
  if (master_kind < SFT_MASTER_NONE || master_kind > SFT_MASTER_SPLIT) return SFT_BAD_ARGUMENT;
  const int64_t n_tiles = w->n;
  if (!alike(w, n_tiles) || !all_known(grads, n_tiles) || !alike(exp_avg, n_tiles) ||
      !alike(exp_avg_sq, n_tiles) ||
      (master_kind && (!valid_tiles(master) || master->n != n_tiles)) ||
      (l1 != 0 && !all_known(anchors, n_tiles))) {
    return SFT_BAD_ARGUMENT;
  }
  const int32_t dtype = n_tiles > 0 ? w->dtype[0] : SFT_F32;
  const int32_t moments = n_tiles > 0 ? exp_avg->dtype[0] : SFT_F32;
  if (n_tiles > 0 && (moments == SFT_F16 || exp_avg_sq->dtype[0] != moments ||
                      (master_kind == SFT_MASTER_F32 &&
                       (!alike(master, n_tiles) || master->dtype[0] != SFT_F32)) ||
                      (master_kind == SFT_MASTER_SPLIT && dtype != SFT_BF16))) {
    return SFT_BAD_ARGUMENT;
  }
  if (found_inf && *found_inf != 0) return SFT_OK;

  const IeeeMode ieee;
  const Scalars s(*step, *lr, beta1, beta2, eps, l1, grad_scale, clip);
  const float keep = static_cast<float>(1 - *lr * weight_decay);
  const bool decay = weight_decay != 0;
  *step = static_cast<float>(s.t);

  int64_t work = 0;
  for (int64_t t = 0; t < n_tiles; ++t) work += grads->base[t] ? w->length[t] : 0;
  with_dtype(dtype, [&](auto type) {
    using Type = decltype(type);
    for_each(n_tiles, threads, work, [&](int64_t t, int32_t) {
      if (!grads->base[t]) return;
      typename Type::Raw *weights = address<Type>(w->base[t]);
      for_blocks(0, w->length[t], [&](int64_t first, int64_t n) {
        float g_buffer[kBlock], x_buffer[kBlock], m_buffer[kBlock], v_buffer[kBlock];
        float *x = x_buffer;
        uint16_t *low = nullptr;
        if (master_kind == SFT_MASTER_SPLIT) {
          low = address<BF16>(master->base[t]) + first;
          join(address<BF16>(w->base[t]) + first, low, n, x);
        } else if (master_kind == SFT_MASTER_F32) {
          x = address<F32>(master->base[t]) + first;
        } else {
          x = editable(dtype, w->base[t], first, n, x_buffer);
        }

        const float *g =
            as_floats(grads->dtype[t], address<F32>(grads->base[t]), first, n, g_buffer);
        if (s.grad_scale) {
          const float scale = *s.grad_scale;
          for (int64_t i = 0; i < n; ++i) g_buffer[i] = g[i] / scale;
          g = g_buffer;
        }
        if (s.l1 != 0) {
          float anchor_buffer[kBlock];
          const float *anchor =
              as_floats(anchors->dtype[t], address<F32>(anchors->base[t]), first, n, anchor_buffer);
          for (int64_t i = 0; i < n; ++i) g_buffer[i] = g[i] + s.l1 * sign(x[i] - anchor[i]);
          g = g_buffer;
        }
        if (s.clip) {
          const float factor = *s.clip;
          for (int64_t i = 0; i < n; ++i) g_buffer[i] = g[i] * factor;
          g = g_buffer;
        }

        float *m = editable(moments, exp_avg->base[t], first, n, m_buffer);
        float *v = editable(moments, exp_avg_sq->base[t], first, n, v_buffer);
        (decay ? update<true> : update<false>)(s, keep, n, g, m, v, x);
        if (moments == SFT_BF16) {
          BF16::store(m, n, address<BF16>(exp_avg->base[t]) + first);
          BF16::store(v, n, address<BF16>(exp_avg_sq->base[t]) + first);
        }
        if (low) {
          split(x, n, address<BF16>(w->base[t]) + first, low);
        } else if (static_cast<const void *>(x) != static_cast<const void *>(weights + first)) {
          Type::store(x, n, weights + first);
        }
      });
    });
  });
  return SFT_OK;
}

}  // namespace sft::SFT_ISA
