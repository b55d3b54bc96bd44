// merge: the weighted sum of sparse deltas as one sparse delta, in the order of the deltas:
// acc = fl(acc + fl(alpha_j * val_j)) from +0. An acc of 0 stays, as an explicit 0.
//
// A tile's union is a bitmap of 8 KB, its sums are an accumulator of 65,536 binary32 values that is
// all 0 between tiles.
//
// Moves: idx of all deltas twice, their values once, the result once.
#include "common.h"

namespace sft::SFT_ISA {
namespace {

constexpr int64_t kAccBytes = SFT_TILE * sizeof(float);

// The entries of a tile that lie in any delta, one bit each.
struct Union {
  uint64_t word[SFT_TILE / 64];
  int64_t words;  // those that are in use

  Union(int64_t t, int32_t n_deltas, const uint16_t *const *idx, const int64_t *const *ptr) {
    words = 0;
    for (int32_t j = 0; j < n_deltas; ++j) {
      const int64_t end = ptr[j][t + 1];
      if (end == ptr[j][t]) continue;
      const int64_t needed = idx[j][end - 1] / 64 + 1;
      words = words > needed ? words : needed;
    }
    memset(word, 0, static_cast<size_t>(words) * sizeof(uint64_t));
    for (int32_t j = 0; j < n_deltas; ++j) {
      const int64_t end = ptr[j][t + 1];
      for (int64_t e = ptr[j][t]; e < end; ++e) word[idx[j][e] / 64] |= 1ull << (idx[j][e] % 64);
    }
  }

  int64_t count() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < words; ++i) sum += __builtin_popcountll(word[i]);
    return sum;
  }
};

bool valid(int64_t n_tiles, int32_t n_deltas, const uint16_t *const *idx, const int64_t *const *ptr,
           int64_t *nnz) {
  if (n_tiles < 0 || n_deltas < 0 || (n_deltas > 0 && (!idx || !ptr))) return false;
  *nnz = 0;
  for (int32_t j = 0; j < n_deltas; ++j) {
    if (!ptr[j] || (ptr[j][n_tiles] > 0 && !idx[j])) return false;
    *nnz += ptr[j][n_tiles];
  }
  return true;
}

}  // namespace

int64_t merge_workspace_bytes(int32_t n_deltas, int32_t threads) {
  return n_deltas > 1 ? (threads < 1 ? 1 : threads) * kAccBytes : 0;
}

int32_t merge_count(int64_t n_tiles, int32_t n_deltas, const uint16_t *const *idx,
                    const int64_t *const *ptr, int64_t *out_ptr, void *, int64_t, int32_t threads) {
  int64_t nnz = 0;
  if (!valid(n_tiles, n_deltas, idx, ptr, &nnz) || !out_ptr) return SFT_BAD_ARGUMENT;
  out_ptr[0] = 0;
  for_each(n_tiles, threads, nnz, [&](int64_t t, int32_t) {
    out_ptr[t + 1] =
        n_deltas == 1 ? ptr[0][t + 1] - ptr[0][t] : Union(t, n_deltas, idx, ptr).count();
  });
  for (int64_t t = 0; t < n_tiles; ++t) out_ptr[t + 1] += out_ptr[t];
  return SFT_OK;
}

int32_t merge_fill(int64_t n_tiles, int32_t n_deltas, const uint16_t *const *idx,
                   const int64_t *const *ptr, const void *const *val, const int32_t *val_dtype,
                   const float *alpha, const int64_t *out_ptr, uint16_t *out_idx, float *out_val,
                   void *workspace, int64_t workspace_bytes, int32_t threads) {
  int64_t nnz = 0;
  if (!valid(n_tiles, n_deltas, idx, ptr, &nnz) || !out_ptr) return SFT_BAD_ARGUMENT;
  if (nnz > 0 && (!out_idx || !out_val || !val || !val_dtype || !alpha)) return SFT_BAD_ARGUMENT;
  for (int32_t j = 0; nnz > 0 && j < n_deltas; ++j) {
    if (!known_dtype(val_dtype[j]) || (ptr[j][n_tiles] > 0 && !val[j])) return SFT_BAD_ARGUMENT;
  }
  const int64_t needed = merge_workspace_bytes(n_deltas, threads);
  if (workspace_bytes < needed || (needed > 0 && !workspace)) return SFT_WORKSPACE;
  if (nnz == 0) return SFT_OK;

  if (n_deltas == 1) {
    for_each(n_tiles, threads, nnz, [&](int64_t t, int32_t) {
      for_blocks(ptr[0][t], ptr[0][t + 1], [&](int64_t e, int64_t n) {
        float buffer[kBlock];
        const float *x = as_floats(val_dtype[0], val[0], e, n, buffer);
        memcpy(out_idx + e, idx[0] + e, static_cast<size_t>(n) * sizeof(uint16_t));
        for (int64_t i = 0; i < n; ++i) out_val[e + i] = 0.0f + alpha[0] * x[i];
      });
    });
    return SFT_OK;
  }

  float *all = static_cast<float *>(workspace);
  const int32_t team = team_size(n_tiles, threads, nnz);
  for_each(team, team, kSerialWork,
           [&](int64_t i, int32_t) { memset(all + i * SFT_TILE, 0, kAccBytes); });
  for_each(n_tiles, threads, nnz, [&](int64_t t, int32_t thread) {
    float *acc = all + thread * int64_t{SFT_TILE};
    for (int32_t j = 0; j < n_deltas; ++j) {
      for_blocks(ptr[j][t], ptr[j][t + 1], [&](int64_t e, int64_t n) {
        const uint16_t *at = idx[j] + e;
        float buffer[kBlock];
        const float *x = as_floats(val_dtype[j], val[j], e, n, buffer);
        for (int64_t i = 0; i < n; ++i) acc[at[i]] = acc[at[i]] + alpha[j] * x[i];
      });
    }
    const Union entries(t, n_deltas, idx, ptr);
    int64_t e = out_ptr[t];
    for (int64_t i = 0; i < entries.words; ++i) {
      for (uint64_t left = entries.word[i]; left; left &= left - 1) {
        const int64_t at = i * 64 + __builtin_ctzll(left);
        out_idx[e] = static_cast<uint16_t>(at);
        out_val[e++] = acc[at];
        acc[at] = 0;
      }
    }
  });
  return SFT_OK;
}

}  // namespace sft::SFT_ISA
