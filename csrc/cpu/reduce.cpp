// reduce: what several sparse deltas say of each entry of their union, in the order of the deltas:
// of x_j = fl(alpha_j * val_j) the sums of all, of the positive and of the negative ones, the one of
// largest magnitude, and how many there are. Rules of merging are functions of these.
//
// Moves: idx of all deltas twice, their values once, the result (24 bytes an entry) once.
#include "union.h"

namespace sft::SFT_ISA {
namespace {

// The results from some entry on.
struct Results {
  float *total, *positive, *negative, *largest;
  int16_t *n_present, *n_positive, *n_negative;

  Results from(int64_t e) const {
    return {total + e,     positive + e,   negative + e,  largest + e,
            n_present + e, n_positive + e, n_negative + e};
  }

  void clear(int64_t n) const {
    float *const sums[] = {total, positive, negative, largest};
    int16_t *const counts[] = {n_present, n_positive, n_negative};
    for (float *x : sums) memset(x, 0, static_cast<size_t>(n) * sizeof(float));
    for (int16_t *x : counts) memset(x, 0, static_cast<size_t>(n) * sizeof(int16_t));
  }

  void prefer_huge(int64_t n) const {
    float *const sums[] = {total, positive, negative, largest};
    int16_t *const counts[] = {n_present, n_positive, n_negative};
    for (float *x : sums) prefer_huge_pages(x, n * int64_t{sizeof(float)});
    for (int16_t *x : counts) prefer_huge_pages(x, n * int64_t{sizeof(int16_t)});
  }

  // Without branches: signs are nothing that a processor could guess.
  void add(int64_t at, float x) const {
    const float most = largest[at], size = __builtin_fabsf(x), most_size = __builtin_fabsf(most);
    total[at] = total[at] + x;
    positive[at] = positive[at] + (x > 0 ? x : 0.0f);
    negative[at] = negative[at] + (x < 0 ? x : 0.0f);
    largest[at] = (size > most_size) | ((size == most_size) & (x > most)) ? x : most;
    n_present[at] = static_cast<int16_t>(n_present[at] + 1);
    n_positive[at] = static_cast<int16_t>(n_positive[at] + (x > 0));
    n_negative[at] = static_cast<int16_t>(n_negative[at] + (x < 0));
  }

  // The same for n entries that no other delta has.
  void set(const float *x, float alpha, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) total[i] = 0.0f + alpha * x[i];
    for (int64_t i = 0; i < n; ++i) positive[i] = total[i] > 0 ? total[i] : 0.0f;
    for (int64_t i = 0; i < n; ++i) negative[i] = total[i] < 0 ? total[i] : 0.0f;
    for (int64_t i = 0; i < n; ++i) largest[i] = total[i] == total[i] ? total[i] : 0.0f;
    for (int64_t i = 0; i < n; ++i) n_present[i] = 1;
    for (int64_t i = 0; i < n; ++i) n_positive[i] = total[i] > 0;
    for (int64_t i = 0; i < n; ++i) n_negative[i] = total[i] < 0;
  }
};

}  // namespace

int32_t reduce(int64_t n_tiles, int32_t n_deltas, const uint16_t *const *idx,
               const int64_t *const *ptr, const void *const *val, const int32_t *val_dtype,
               const float *alpha, const int64_t *out_ptr, uint16_t *out_idx, float *total,
               float *positive, float *negative, float *largest, int16_t *n_present,
               int16_t *n_positive, int16_t *n_negative, int32_t threads) {
  int64_t nnz = 0;
  if (!valid_deltas(n_tiles, n_deltas, idx, ptr, &nnz) || !out_ptr || n_deltas > INT16_MAX) {
    return SFT_BAD_ARGUMENT;
  }
  if (nnz == 0) return SFT_OK;
  if (!out_idx || !total || !positive || !negative || !largest || !n_present || !n_positive ||
      !n_negative || !val || !val_dtype || !alpha) {
    return SFT_BAD_ARGUMENT;
  }
  for (int32_t j = 0; j < n_deltas; ++j) {
    if (!known_dtype(val_dtype[j]) || (ptr[j][n_tiles] > 0 && !val[j])) return SFT_BAD_ARGUMENT;
  }

  const Results out{total, positive, negative, largest, n_present, n_positive, n_negative};
  out.prefer_huge(out_ptr[n_tiles]);
  prefer_huge_pages(out_idx, out_ptr[n_tiles] * int64_t{sizeof(uint16_t)});
  for_each(n_tiles, threads, nnz, [&](int64_t t, int32_t) {
    const int32_t only = only_delta(t, n_deltas, ptr);
    if (only == kNone) return;
    uint16_t *at = out_idx + out_ptr[t];
    const Results here = out.from(out_ptr[t]);
    if (only != kSeveral) {
      const int64_t begin = ptr[only][t], end = ptr[only][t + 1];
      memcpy(at, idx[only] + begin, static_cast<size_t>(end - begin) * sizeof(uint16_t));
      for_blocks(begin, end, [&](int64_t e, int64_t n) {
        float buffer[kBlock];
        const float *x = as_floats(val_dtype[only], val[only], e, n, buffer);
        here.from(e - begin).set(x, alpha[only], n);
      });
      return;
    }
    Union entries(t, n_deltas, idx, ptr);
    here.clear(entries.rank());
    for (int32_t j = 0; j < n_deltas; ++j) {
      for_blocks(ptr[j][t], ptr[j][t + 1], [&](int64_t e, int64_t n) {
        float buffer[kBlock];
        const float *x = as_floats(val_dtype[j], val[j], e, n, buffer);
        for (int64_t i = 0; i < n; ++i) {
          const uint16_t offset = idx[j][e + i];
          const int64_t place = entries.place(offset);
          at[place] = offset;
          here.add(place, alpha[j] * x[i]);
        }
      });
    }
  });
  return SFT_OK;
}

}  // namespace sft::SFT_ISA
