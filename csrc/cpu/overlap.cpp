// overlap: what two deltas have in common, per tile: entries, equal signs, and in binary64 the sums
// of a * b, a * a and b * b over the entries in both, by runs of the entries of a.
//
// The entries ascend, so that their lists are walked through together, in blocks of 8: every entry
// of a block of a is compared with every entry of a block of b, and the block that ends first (both,
// where they end alike) makes room for the next one of its list.
//
// Moves: idx of both deltas, and the values that both have.
#include "common.h"

namespace sft::SFT_ISA {
namespace {

constexpr int64_t kSide = 8;

// Bit 8 * r + i says whether a[i] == b[(i + r) % 8].
inline uint64_t equal_pairs(const uint16_t *a, const uint16_t *b) {
#if defined(__SSE2__)
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i *>(a));
  const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i *>(b));
  const __m128i z = _mm_or_si128(_mm_srli_si128(y, 2), _mm_slli_si128(y, 14));
  const auto equal = [&](__m128i even, __m128i odd) -> uint64_t {
    return static_cast<uint32_t>(
        _mm_movemask_epi8(_mm_packs_epi16(_mm_cmpeq_epi16(x, even), _mm_cmpeq_epi16(x, odd))));
  };
  return equal(y, z) | equal(_mm_shuffle_epi32(y, 0x39), _mm_shuffle_epi32(z, 0x39)) << 16 |
         equal(_mm_shuffle_epi32(y, 0x4E), _mm_shuffle_epi32(z, 0x4E)) << 32 |
         equal(_mm_shuffle_epi32(y, 0x93), _mm_shuffle_epi32(z, 0x93)) << 48;
#else
  uint16_t twice[2 * kSide], any[kSide] = {};
  memcpy(twice, b, kSide * sizeof(uint16_t));
  memcpy(twice + kSide, b, kSide * sizeof(uint16_t));
  for (int64_t r = 0; r < kSide; ++r) {
    for (int64_t i = 0; i < kSide; ++i) any[i] |= a[i] == twice[i + r];
  }
  uint64_t equal = 0;
  for (int64_t i = 0; i < kSide; ++i) {
    for (int64_t r = 0; any[i] && r < kSide; ++r) {
      equal |= static_cast<uint64_t>(a[i] == twice[i + r]) << (8 * r + i);
    }
  }
  return equal;
#endif
}

inline float value_at(int32_t dtype, const void *values, int64_t e) {
  if (dtype == SFT_F32) return static_cast<const float *>(values)[e];
  const uint16_t half = static_cast<const uint16_t *>(values)[e];
  return dtype == SFT_BF16 ? f32_of_bf16(half) : f32_of_f16(half);
}

// The sum of a run whose first halving has been done.
constexpr int64_t kHalf = SFT_SUM_RUN / 2;
inline double sum_of_half(const double *half) {
  double x[kHalf / 8], y[kHalf / 64];
  halve_thrice(kHalf / 8, [&](int64_t i) { return half[i]; }, x);
  halve_thrice(kHalf / 64, [&](int64_t i) { return x[i]; }, y);
  return halve_to_one(y, kHalf / 64);
}

}  // namespace

int32_t overlap(int64_t n_tiles, const uint16_t *idx_a, const int64_t *ptr_a, const void *val_a,
                int32_t dtype_a, const uint16_t *idx_b, const int64_t *ptr_b, const void *val_b,
                int32_t dtype_b, int64_t *counts, double *dots, int32_t threads) {
  if (n_tiles < 0 || !ptr_a || !ptr_b || !known_dtype(dtype_a) || !known_dtype(dtype_b) ||
      (n_tiles > 0 && (!counts || !dots))) {
    return SFT_BAD_ARGUMENT;
  }
  const int64_t nnz_a = ptr_a[n_tiles], nnz_b = ptr_b[n_tiles];
  if ((nnz_a > 0 && (!idx_a || !val_a)) || (nnz_b > 0 && (!idx_b || !val_b))) {
    return SFT_BAD_ARGUMENT;
  }
  const int64_t width_a = dtype_a == SFT_F32 ? 4 : 2, width_b = dtype_b == SFT_F32 ? 4 : 2;
  for_each(n_tiles, threads, nnz_a + nnz_b, [&](int64_t t, int32_t) {
    const int64_t end_a = ptr_a[t + 1], begin_b = ptr_b[t], end_b = ptr_b[t + 1];
    int64_t both = 0, same_sign = 0;
    double dot[3] = {};
    if (ptr_a[t] < end_a && begin_b < end_b) {
      // The last blocks are filled up with the last entry, so that each ends with its largest.
      const int64_t whole_a = end_a - (end_a - ptr_a[t]) % kSide;
      const int64_t whole_b = end_b - (end_b - begin_b) % kSide;
      uint16_t tail_a[kSide], tail_b[kSide];
      for (int64_t k = 0; k < kSide; ++k) {
        tail_a[k] = idx_a[whole_a + k < end_a ? whole_a + k : end_a - 1];
        tail_b[k] = idx_b[whole_b + k < end_b ? whole_b + k : end_b - 1];
      }
      int64_t j = begin_b;
      for (int64_t first = ptr_a[t]; first < end_a && j < end_b; first += SFT_SUM_RUN) {
        const int64_t end = end_a - first < SFT_SUM_RUN ? end_a : first + SFT_SUM_RUN;
        // The pairs of blocks with common entries, of which the run has at most SFT_SUM_RUN.
        uint64_t equal[SFT_SUM_RUN];
        int64_t block_a[SFT_SUM_RUN], block_b[SFT_SUM_RUN];
        int64_t n_blocks = 0, i = first;
        const auto compare = [&](const uint16_t *a, const uint16_t *b) {
          if (const uint64_t found = equal_pairs(a, b)) {
            equal[n_blocks] = found;
            block_a[n_blocks] = i;
            block_b[n_blocks++] = j;
          }
          // By arithmetic: which list moves on cannot be predicted, and compilers branch on ?:.
          const int32_t last_a = a[kSide - 1], last_b = b[kSide - 1];
          i += (last_a - last_b - 1) >> 31 & kSide;
          j += (last_b - last_a - 1) >> 31 & kSide;
        };
        const int64_t stop = end < whole_a ? end : whole_a;
        while (i < stop && j < whole_b) compare(idx_a + i, idx_b + j);
        while (i < end && j < end_b) {
          compare(i < whole_a ? idx_a + i : tail_a, j < whole_b ? idx_b + j : tail_b);
        }

        int64_t entry_a[SFT_SUM_RUN], entry_b[SFT_SUM_RUN];
        int64_t n = 0;
        for (int64_t k = 0; k < n_blocks; ++k) {
          for (uint64_t rest = equal[k]; rest != 0; rest &= rest - 1) {
            const int64_t bit = __builtin_ctzll(rest);
            const int64_t e = block_a[k] + bit % kSide,
                          f = block_b[k] + (bit + bit / kSide) % kSide;
            if (e >= end_a || f >= end_b) continue;  // fills a last block up
            entry_a[n] = e;
            entry_b[n++] = f;
            prefetch(static_cast<const char *>(val_a) + e * width_a);
            prefetch(static_cast<const char *>(val_b) + f * width_b);
          }
        }
        if (n == 0) continue;
        // Sums of two values have no order: the first halving needs no array of its own.
        double half[3][kHalf] = {};
        for (int64_t k = 0; k < n; ++k) {
          const double a = value_at(dtype_a, val_a, entry_a[k]);
          const double b = value_at(dtype_b, val_b, entry_b[k]);
          const int64_t at = (entry_a[k] - first) % kHalf;
          same_sign += ((a > 0) & (b > 0)) | ((a < 0) & (b < 0));
          half[0][at] += a * b;
          half[1][at] += a * a;
          half[2][at] += b * b;
        }
        for (int k = 0; k < 3; ++k) dot[k] += sum_of_half(half[k]);
        both += n;
      }
    }
    counts[2 * t] = both;
    counts[2 * t + 1] = same_sign;
    for (int k = 0; k < 3; ++k) dots[3 * t + k] = dot[k];
  });
  return SFT_OK;
}

}  // namespace sft::SFT_ISA
