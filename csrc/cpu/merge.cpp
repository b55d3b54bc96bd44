// merge: the weighted sum of sparse deltas as one sparse delta, in the order of the deltas:
// acc = fl(acc + fl(alpha_j * val_j)) from +0. An acc of 0 stays, as an explicit 0.
//
// Moves: idx of all deltas twice, their values once, the result once.
#include "union.h"

namespace sft::SFT_ISA {

int64_t merge_workspace_bytes(int32_t, int32_t) { return 0; }

int32_t merge_count(int64_t n_tiles, int32_t n_deltas, const uint16_t *const *idx,
                    const int64_t *const *ptr, int64_t *out_ptr, void *, int64_t, int32_t threads) {
  int64_t nnz = 0;
  if (!valid_deltas(n_tiles, n_deltas, idx, ptr, &nnz) || !out_ptr) return SFT_BAD_ARGUMENT;
  out_ptr[0] = 0;
  for_each(n_tiles, threads, nnz, [&](int64_t t, int32_t) {
    const int32_t j = only_delta(t, n_deltas, ptr);
    out_ptr[t + 1] = j == kNone      ? 0
                     : j == kSeveral ? Union(t, n_deltas, idx, ptr).count()
                                     : ptr[j][t + 1] - ptr[j][t];
  });
  for (int64_t t = 0; t < n_tiles; ++t) out_ptr[t + 1] += out_ptr[t];
  return SFT_OK;
}

int32_t merge_fill(int64_t n_tiles, int32_t n_deltas, const uint16_t *const *idx,
                   const int64_t *const *ptr, const void *const *val, const int32_t *val_dtype,
                   const float *alpha, const int64_t *out_ptr, uint16_t *out_idx, float *out_val,
                   void *, int64_t, int32_t threads) {
  int64_t nnz = 0;
  if (!valid_deltas(n_tiles, n_deltas, idx, ptr, &nnz) || !out_ptr) return SFT_BAD_ARGUMENT;
  if (nnz > 0 && (!out_idx || !out_val || !val || !val_dtype || !alpha)) return SFT_BAD_ARGUMENT;
  for (int32_t j = 0; nnz > 0 && j < n_deltas; ++j) {
    if (!known_dtype(val_dtype[j]) || (ptr[j][n_tiles] > 0 && !val[j])) return SFT_BAD_ARGUMENT;
  }
  if (nnz == 0) return SFT_OK;

  prefer_huge_pages(out_idx, out_ptr[n_tiles] * int64_t{sizeof(uint16_t)});
  prefer_huge_pages(out_val, out_ptr[n_tiles] * int64_t{sizeof(float)});
  for_each(n_tiles, threads, nnz, [&](int64_t t, int32_t) {
    const int32_t only = only_delta(t, n_deltas, ptr);
    if (only == kNone) return;
    uint16_t *at = out_idx + out_ptr[t];
    float *sum = out_val + out_ptr[t];
    if (only != kSeveral) {
      const int64_t begin = ptr[only][t], end = ptr[only][t + 1];
      memcpy(at, idx[only] + begin, static_cast<size_t>(end - begin) * sizeof(uint16_t));
      for_blocks(begin, end, [&](int64_t e, int64_t n) {
        float buffer[kBlock];
        const float *x = as_floats(val_dtype[only], val[only], e, n, buffer);
        for (int64_t i = 0; i < n; ++i) sum[e - begin + i] = 0.0f + alpha[only] * x[i];
      });
      return;
    }
    Union entries(t, n_deltas, idx, ptr);
    memset(sum, 0, static_cast<size_t>(entries.rank()) * sizeof(float));
    for (int32_t j = 0; j < n_deltas; ++j) {
      for_blocks(ptr[j][t], ptr[j][t + 1], [&](int64_t e, int64_t n) {
        float buffer[kBlock];
        const float *x = as_floats(val_dtype[j], val[j], e, n, buffer);
        for (int64_t i = 0; i < n; ++i) {
          const uint16_t offset = idx[j][e + i];
          const int64_t place = entries.place(offset);
          at[place] = offset;
          sum[place] = sum[place] + alpha[j] * x[i];
        }
      });
    }
  });
  return SFT_OK;
}

}  // namespace sft::SFT_ISA
