// select_random: k entries, every set of k equally likely: the k largest of 31-bit hashes of (seed,
// tile, offset); see select.h. The bounds follow from theory: hashes are uniform.
//
// key(t, i) = mix(seed * kPayload + (t * 65536 + i + 1) * kPosition) >> 33
//
// Moves: nothing but the candidates and 2 bytes of idx an entry.
#include "mix.h"
#include "select.h"

#include <math.h>

namespace sft::SFT_ISA {
namespace {

struct Hashes {
  static constexpr bool kMayBeInfinite = false;
#if defined(SFT_SELECT_AVX512)
  static constexpr bool kLoads = true;
#else
  static constexpr bool kLoads = false;
#endif

  uint64_t seed;

  void keys(int64_t t, int32_t first, int32_t n, int32_t *__restrict key) const {
    const uint64_t position =
        static_cast<uint64_t>(t) * SFT_TILE + static_cast<uint64_t>(first) + 1;
    const uint64_t start = seed * kPayload + position * kPosition;
    for (int32_t i = 0; i < n; ++i) {
      key[i] = static_cast<int32_t>(mix(start + static_cast<uint64_t>(i) * kPosition) >> 33);
    }
  }

  template <class Use>
  void with_load(int64_t t, int32_t first, const Use &use) const {
#if defined(SFT_SELECT_AVX512)
    const uint64_t position =
        static_cast<uint64_t>(t) * SFT_TILE + static_cast<uint64_t>(first) + 1;
    const uint64_t start = seed * kPayload + position * kPosition;
    typedef uint64_t Words __attribute__((vector_size(64)));
    Words step;
    for (uint64_t i = 0; i < 8; ++i) step[i] = i * kPosition;
    use([step, start](int32_t i) {
      Words z[2];
      for (uint64_t half = 0; half < 2; ++half) {
        Words x = step + (start + (static_cast<uint64_t>(i) + 8 * half) * kPosition);
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
        z[half] = (x ^ (x >> 27)) * 0x94D049BB133111EB;
      }
      const __m512i odd =
          _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
      typedef uint32_t Unsigned __attribute__((vector_size(64)));
      return (Lanes)((Unsigned)_mm512_permutex2var_epi32((__m512i)z[0], odd, (__m512i)z[1]) >> 1);
    });
#else
    (void)t, (void)first, (void)use;
#endif
  }

  // Six standard errors on either side of the quantile.
  Bounds bounds(const Selection<Hashes> &s, int64_t room) const {
    const double k = static_cast<double>(s.k), eligible = static_cast<double>(s.eligible);
    const double margin = 6 * sqrt(k) + 16;
    const auto key_above = [&](double rank) {
      const double key = floor((1 - rank / eligible) * 2147483648.0) - 1;
      return key < -1 ? -1 : key > kNoLimit ? kNoLimit : static_cast<int32_t>(key);
    };
    const bool many = s.k > s.total / 5 || k + margin > 0.9 * static_cast<double>(room);
    const int32_t high = key_above(k - margin);
    return {key_above(k + margin), high, many ? high : kNoLimit};
  }
};

using Random = Selection<Hashes>;

}  // namespace

int32_t select_random_find(const int32_t *length, int64_t n_tiles, int64_t k, uint64_t seed,
                           const uint16_t *exclude_idx, const int64_t *exclude_ptr, int64_t *ptr,
                           int64_t *info, void *workspace, int64_t workspace_bytes,
                           int32_t threads) {
  threads = threads < 1 ? 1 : threads;
  const int32_t status = check_selection(length, n_tiles, k, exclude_idx, exclude_ptr, ptr, info,
                                         workspace, workspace_bytes, threads);
  if (status != SFT_OK) return status;
  Random selection = {{seed}, length, n_tiles, k, exclude_idx, exclude_ptr, threads};
  selection.ws = lay_out(workspace, n_tiles, k, threads);
  prefer_huge_pages(workspace, workspace_bytes);
  return selection.find(false, ptr, info);
}

int32_t select_random_emit(const int32_t *length, int64_t n_tiles, int64_t k, uint64_t seed,
                           const uint16_t *exclude_idx, const int64_t *exclude_ptr,
                           const int64_t *ptr, const int64_t *info, void *workspace,
                           int64_t workspace_bytes, uint16_t *idx, int32_t threads) {
  threads = threads < 1 ? 1 : threads;
  const int32_t status = check_selection(length, n_tiles, k, exclude_idx, exclude_ptr, ptr, info,
                                         workspace, workspace_bytes, threads);
  if (status != SFT_OK) return status;
  if (ptr[n_tiles] == 0) return SFT_OK;
  if (!idx) return SFT_BAD_ARGUMENT;
  Random selection = {{seed}, length, n_tiles, k, exclude_idx, exclude_ptr, threads};
  selection.ws = lay_out(workspace, n_tiles, k, threads);
  prefer_huge_pages(idx, 2 * ptr[n_tiles]);
  return selection.emit(ptr, idx);
}

}  // namespace sft::SFT_ISA
