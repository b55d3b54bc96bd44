// digest: two sums mod 2^64 over (position, bits) of the selected weights, as binary32 and rounded
// to bfloat16. Integer sums have no order, so threads add as they come.
//
// Moves: the lines of w that hold selected entries, and 2 bytes of idx an entry.
#include "common.h"
#include "mix.h"

namespace sft::SFT_ISA {

int32_t digest(const sft_tiles *w, const uint16_t *idx, const int64_t *ptr, uint64_t *out,
               int32_t threads) {
  if (!valid_tiles(w) || !ptr || !out) return SFT_BAD_ARGUMENT;
  const int64_t nnz = ptr[w->n];
  if (nnz > 0 && !idx) return SFT_BAD_ARGUMENT;
  for (int64_t t = 0; t < w->n; ++t) {
    if (!known_dtype(w->dtype[t])) return SFT_BAD_ARGUMENT;
  }
  uint64_t full = 0, half = 0;
  for_each(w->n, threads, nnz, [&](int64_t t, int32_t) {
    uint64_t tile_full = 0, tile_half = 0;
    const uint64_t first = static_cast<uint64_t>(t) * SFT_TILE + 1;
    const int64_t begin = ptr[t], end = ptr[t + 1];
    with_dtype(w->dtype[t], [&](auto type) {
      using Type = decltype(type);
      const typename Type::Raw *weights = address<Type>(w->base[t]);
      for_blocks(begin, end, [&](int64_t e, int64_t n) {
        float x[kBlock];
        gather_floats<Type>(weights, idx, begin, e, end, n, x);
        uint64_t block_full = 0, block_half = 0;
        for (int64_t i = 0; i < n; ++i) {
          const uint64_t position = (first + idx[e + i]) * kPosition;
          block_full += mix(position + bits_of(x[i]) * kPayload);
          block_half += mix(position + bf16_of_f32(x[i]) * kPayload);
        }
        tile_full += block_full;
        tile_half += block_half;
      });
    });
    __atomic_fetch_add(&full, tile_full, __ATOMIC_RELAXED);
    __atomic_fetch_add(&half, tile_half, __ATOMIC_RELAXED);
  });
  out[0] = full;
  out[1] = half;
  return SFT_OK;
}

}  // namespace sft::SFT_ISA
