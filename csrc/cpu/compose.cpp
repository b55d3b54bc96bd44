// compose: w = round(w + acc), acc = fl(acc + fl(alpha_j * val_j)) from +0 over the deltas j.
// restore: the weights that compose wrote to an undo log, bit for bit.
//
// One delta needs no accumulator. With several, each tile has an accumulator of 65,536 binary32
// values, all 0 between tiles: the first delta that meets an entry takes its sum out and leaves 0,
// so that the deltas after it find nothing to add.
//
// Moves: the lines of w that hold selected entries (read and written); an entry of a delta moves 2
// bytes of idx, one value and one undo value.
#include "common.h"

namespace sft::SFT_ISA {
namespace {

constexpr int64_t kAccBytes = SFT_TILE * sizeof(float);

struct Stats {
  int64_t changed = 0, swallowed = 0;
};

// raw = round(raw + acc) where acc is not 0, and counts.
template <class Type>
inline void add(const float *acc, int64_t n, typename Type::Raw *raw, Stats *stats) {
  using Raw = typename Type::Raw;
  float sum[kBlock];
  Raw rounded[kBlock];
  Type::load(raw, n, sum);
  for (int64_t i = 0; i < n; ++i) sum[i] = sum[i] + acc[i];
  Type::store(sum, n, rounded);
  int32_t changed = 0, swallowed = 0;
  for (int64_t i = 0; i < n; ++i) changed += acc[i] != 0;
  for (int64_t i = 0; i < n; ++i) {
    const Raw old = raw[i];
    raw[i] = acc[i] != 0 ? rounded[i] : old;
    swallowed += same_bits(old, raw[i]);
  }
  // Those whose acc is 0 have kept their bits, too; taken out here, so that the loops are vectors.
  swallowed -= static_cast<int32_t>(n) - changed;
  stats->changed += changed;
  stats->swallowed += swallowed;
}

struct Deltas {
  int32_t n;
  const uint16_t *const *idx;
  const int64_t *const *ptr;
  const void *const *val;
  const int32_t *dtype;
  const float *alpha;
  void *const *undo;
};

template <class Type>
inline void compose_one(const Deltas &deltas, int64_t t, typename Type::Raw *w, Stats *stats) {
  using Raw = typename Type::Raw;
  const uint16_t *idx = deltas.idx[0];
  Raw *undo = deltas.undo ? static_cast<Raw *>(deltas.undo[0]) : nullptr;
  const int64_t begin = deltas.ptr[0][t], end = deltas.ptr[0][t + 1];
  for_blocks(begin, end, [&](int64_t e, int64_t n) {
    float buffer[kBlock], acc[kBlock];
    Raw raw[kBlock];
    fetch_ahead(w, idx, begin, e, end);
    gather_raw(w, idx + e, n, raw);
    if (undo) memcpy(undo + e, raw, static_cast<size_t>(n) * sizeof(Raw));
    const float *val = as_floats(deltas.dtype[0], deltas.val[0], e, n, buffer);
    for (int64_t i = 0; i < n; ++i) acc[i] = 0.0f + deltas.alpha[0] * val[i];
    add<Type>(acc, n, raw, stats);
    scatter_raw(raw, idx + e, n, w);
  });
}

template <class Type>
inline void compose_many(const Deltas &deltas, int64_t t, typename Type::Raw *w, float *tile_acc,
                         Stats *stats) {
  using Raw = typename Type::Raw;
  for (int32_t j = 0; j < deltas.n; ++j) {
    const uint16_t *idx = deltas.idx[j];
    Raw *undo = deltas.undo ? static_cast<Raw *>(deltas.undo[j]) : nullptr;
    const int64_t begin = deltas.ptr[j][t], end = deltas.ptr[j][t + 1];
    for_blocks(begin, end, [&](int64_t e, int64_t n) {
      float buffer[kBlock];
      fetch_ahead(w, idx, begin, e, end);
      if (undo) gather_raw(w, idx + e, n, undo + e);
      const float *val = as_floats(deltas.dtype[j], deltas.val[j], e, n, buffer);
      const float alpha = deltas.alpha[j];
      for (int64_t i = 0; i < n; ++i) {
        float *sum = &tile_acc[idx[e + i]];
        *sum = *sum + alpha * val[i];
      }
    });
  }
  for (int32_t j = 0; j < deltas.n; ++j) {
    const uint16_t *idx = deltas.idx[j];
    for_blocks(deltas.ptr[j][t], deltas.ptr[j][t + 1], [&](int64_t e, int64_t n) {
      float acc[kBlock];
      Raw raw[kBlock];
      for (int64_t i = 0; i < n; ++i) {
        acc[i] = tile_acc[idx[e + i]];
        tile_acc[idx[e + i]] = 0;
      }
      gather_raw(w, idx + e, n, raw);
      add<Type>(acc, n, raw, stats);
      scatter_raw(raw, idx + e, n, w);
    });
  }
}

// Whether w is one data type and the lists are there; nnz receives the entries in all.
bool valid(const sft_tiles *w, int32_t n_deltas, const uint16_t *const *idx,
           const int64_t *const *ptr, int64_t *nnz) {
  if (!valid_tiles(w) || n_deltas < 0 || (n_deltas > 0 && (!idx || !ptr))) return false;
  for (int64_t t = 0; t < w->n; ++t) {
    if (!known_dtype(w->dtype[t]) || w->dtype[t] != w->dtype[0]) return false;
  }
  *nnz = 0;
  for (int32_t j = 0; j < n_deltas; ++j) {
    if (!ptr[j] || (ptr[j][w->n] > 0 && !idx[j])) return false;
    *nnz += ptr[j][w->n];
  }
  return true;
}

}  // namespace

int64_t compose_workspace_bytes(int32_t n_deltas, int32_t threads) {
  return n_deltas > 1 ? (threads < 1 ? 1 : threads) * kAccBytes : 0;
}

int32_t compose(const sft_tiles *w, int32_t n_deltas, const uint16_t *const *idx,
                const int64_t *const *ptr, const void *const *val, const int32_t *val_dtype,
                const float *alpha, void *const *undo, int64_t *stats, void *workspace,
                int64_t workspace_bytes, int32_t threads) {
  int64_t nnz = 0;
  if (!valid(w, n_deltas, idx, ptr, &nnz) || !stats) return SFT_BAD_ARGUMENT;
  if (n_deltas > 0 && (!val || !val_dtype || !alpha)) return SFT_BAD_ARGUMENT;
  for (int32_t j = 0; j < n_deltas; ++j) {
    const bool empty = ptr[j][w->n] == 0;
    if (!known_dtype(val_dtype[j]) || (!empty && (!val[j] || (undo && !undo[j])))) {
      return SFT_BAD_ARGUMENT;
    }
  }
  const int64_t needed = compose_workspace_bytes(n_deltas, threads);
  if (workspace_bytes < needed || (needed > 0 && !workspace)) return SFT_WORKSPACE;

  const Deltas deltas = {n_deltas, idx, ptr, val, val_dtype, alpha, undo};
  float *acc = static_cast<float *>(workspace);
  stats[0] = stats[1] = 0;
  if (n_deltas == 0 || w->n == 0) return SFT_OK;
  if (n_deltas > 1) {
    const int32_t team = team_size(w->n, threads, nnz);
    for_each(team, team, kSerialWork,
             [&](int64_t i, int32_t) { memset(acc + i * SFT_TILE, 0, kAccBytes); });
  }
  with_dtype(w->dtype[0], [&](auto type) {
    using Type = decltype(type);
    for_each(w->n, threads, nnz, [&](int64_t t, int32_t thread) {
      typename Type::Raw *weights = address<Type>(w->base[t]);
      Stats found;
      if (n_deltas == 1) {
        compose_one<Type>(deltas, t, weights, &found);
      } else {
        compose_many<Type>(deltas, t, weights, acc + thread * int64_t{SFT_TILE}, &found);
      }
      add_atomically(&stats[0], found.changed);
      add_atomically(&stats[1], found.swallowed);
    });
  });
  return SFT_OK;
}

int32_t restore(const sft_tiles *w, int32_t n_deltas, const uint16_t *const *idx,
                const int64_t *const *ptr, const void *const *undo, int32_t threads) {
  int64_t nnz = 0;
  if (!valid(w, n_deltas, idx, ptr, &nnz) || (n_deltas > 0 && !undo)) return SFT_BAD_ARGUMENT;
  for (int32_t j = 0; j < n_deltas; ++j) {
    if (ptr[j][w->n] > 0 && !undo[j]) return SFT_BAD_ARGUMENT;
  }
  if (w->n == 0) return SFT_OK;
  with_dtype(w->dtype[0], [&](auto type) {
    using Type = decltype(type);
    using Raw = typename Type::Raw;
    for_each(w->n, threads, nnz, [&](int64_t t, int32_t) {
      Raw *weights = address<Type>(w->base[t]);
      for (int32_t j = 0; j < n_deltas; ++j) {
        const Raw *log = static_cast<const Raw *>(undo[j]);
        const int64_t begin = ptr[j][t], end = ptr[j][t + 1];
        for_blocks(begin, end, [&](int64_t e, int64_t n) {
          fetch_ahead(weights, idx[j], begin, e, end);
          scatter_raw(log + e, idx[j] + e, n, weights);
        });
      }
    });
  });
  return SFT_OK;
}

}  // namespace sft::SFT_ISA
