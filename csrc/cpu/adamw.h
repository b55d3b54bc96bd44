// The scalars of a step of AdamW, for masked_adamw and dense_adamw.
#ifndef SPARSE_FT_CPU_ADAMW_H
#define SPARSE_FT_CPU_ADAMW_H

#include "common.h"

#include <math.h>

namespace sft::SFT_ISA {
namespace {

// beta^t by binary powering: pow() of the C library has other bits on other machines.
inline double power(double beta, int64_t t) {
  double p = 1;
  for (double b = beta; t > 0; t >>= 1) {
    if (t & 1) p = p * b;
    b = b * b;
  }
  return p;
}

// Formed in binary64, then rounded.
struct Scalars {
  float beta1_rest, beta2, beta2_rest;  // 1 - beta1, beta2, 1 - beta2
  float minus_a, c2, eps, l1;
  const float *grad_scale, *clip;
  int64_t t;

  Scalars(float step, double lr, double beta1, double beta2_, double eps_, float l1_,
          const float *grad_scale_, const float *clip_)
      : l1(l1_), grad_scale(grad_scale_), clip(clip_) {
    t = static_cast<int64_t>(static_cast<double>(step) + 1);
    beta1_rest = static_cast<float>(1 - beta1);
    beta2 = static_cast<float>(beta2_);
    beta2_rest = static_cast<float>(1 - beta2_);
    minus_a = static_cast<float>(-(lr / (1 - power(beta1, t))));
    c2 = static_cast<float>(sqrt(1 - power(beta2_, t)));
    eps = static_cast<float>(eps_);
  }
};

}  // namespace
}  // namespace sft::SFT_ISA

#endif
