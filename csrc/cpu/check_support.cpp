// check_support: are idx and ptr well formed, and the values finite?
//
// ptr is checked first, so that no entry is read through a bad one. Then each tile is swept for any
// fault; only a tile that has one is searched for its first.
//
// Moves: idx, ptr and the values, once.
#include "common.h"

namespace sft::SFT_ISA {
namespace {

enum Fault : int64_t { kNone = 0, kEnds = 1, kSteps = 2, kOrder = 3, kBeyond = 4, kValue = 5 };

// The bits of magnitude of a value, as if it were binary32: 0 only for zeros, and at least
// kNotFinite only for NaN and infinity.
constexpr uint32_t kNotFinite = 0x7F800000;

template <class Type>
inline uint32_t magnitude(const typename Type::Raw *values, int64_t e);
template <>
inline uint32_t magnitude<F32>(const float *values, int64_t e) {
  return bits_of(values[e]) & 0x7FFFFFFF;
}
template <>
inline uint32_t magnitude<BF16>(const uint16_t *values, int64_t e) {
  return static_cast<uint32_t>(values[e] & 0x7FFF) << 16;
}
template <>
inline uint32_t magnitude<F16>(const uint16_t *values, int64_t e) {
  const uint32_t bits = values[e] & 0x7FFF;
  return bits >= 0x7C00 ? kNotFinite : bits;
}

// The fault of entry e, which lies in a tile that begins at entry `first`.
template <class Type>
inline Fault fault_of(const uint16_t *idx, const typename Type::Raw *values, int64_t e,
                      int64_t first, int32_t length) {
  if (e > first && idx[e] <= idx[e - 1]) return kOrder;
  if (idx[e] >= length) return kBeyond;
  if (values && magnitude<Type>(values, e) >= kNotFinite) return kValue;
  return kNone;
}

// Whether any of the entries first … end of a tile has a fault; *zeros += values that are 0.
template <class Type>
inline bool any_fault(const uint16_t *idx, const typename Type::Raw *values, int64_t first,
                      int64_t end, int32_t length, int64_t *zeros) {
  if (first == end) return false;
  uint32_t bad = 0;
  for (int64_t e = first + 1; e < end; ++e) bad |= static_cast<uint32_t>(idx[e] <= idx[e - 1]);
  // Ascending, so the last entry is the largest.
  bad |= static_cast<uint32_t>(idx[end - 1] >= length);
  if (values) {
    uint32_t largest = 0, n_zero = 0;
    for (int64_t e = first; e < end; ++e) {
      const uint32_t m = magnitude<Type>(values, e);
      largest = largest > m ? largest : m;
      n_zero += m == 0;
    }
    bad |= static_cast<uint32_t>(largest >= kNotFinite);
    *zeros += n_zero;
  }
  return bad != 0;
}

int32_t report(int64_t *info, Fault fault, int64_t tile, int64_t entry, int64_t zeros) {
  info[0] = fault;
  info[1] = tile;
  info[2] = entry;
  info[3] = zeros;
  return SFT_OK;
}

}  // namespace

int32_t check_support(const int32_t *length, int64_t n_tiles, const uint16_t *idx,
                      const int64_t *ptr, int64_t nnz, const void *val, int32_t val_dtype,
                      int64_t *info, int32_t threads) {
  if (n_tiles < 0 || nnz < 0 || !ptr || !info || (n_tiles > 0 && !length) || (nnz > 0 && !idx) ||
      (val && !known_dtype(val_dtype))) {
    return SFT_BAD_ARGUMENT;
  }
  if (ptr[0] != 0) return report(info, kEnds, 0, 0, 0);
  if (ptr[n_tiles] != nnz) return report(info, kEnds, n_tiles > 0 ? n_tiles - 1 : 0, 0, 0);
  for (int64_t t = 0; t < n_tiles; ++t) {
    // The second condition as a difference of values that are in order cannot overflow.
    if (ptr[t + 1] < ptr[t] || ptr[t + 1] - ptr[t] > length[t]) {
      return report(info, kSteps, t, ptr[t], 0);
    }
  }
  int64_t zeros = 0, first_bad = n_tiles;
  with_dtype(val ? val_dtype : SFT_F32, [&](auto type) {
    using Type = decltype(type);
    const auto *values = static_cast<const typename Type::Raw *>(val);
    for_each(n_tiles, threads, nnz, [&](int64_t t, int32_t) {
      int64_t found = 0;
      if (any_fault<Type>(idx, values, ptr[t], ptr[t + 1], length[t], &found)) {
        lower_atomically(&first_bad, t);
      }
      if (found) add_atomically(&zeros, found);
    });
    if (first_bad == n_tiles) {
      report(info, kNone, 0, 0, zeros);
      return;
    }
    const int64_t first = ptr[first_bad];
    for (int64_t e = first;; ++e) {
      const Fault fault = fault_of<Type>(idx, values, e, first, length[first_bad]);
      if (fault == kNone) continue;
      report(info, fault, first_bad, e, 0);
      return;
    }
  });
  return SFT_OK;
}

}  // namespace sft::SFT_ISA
