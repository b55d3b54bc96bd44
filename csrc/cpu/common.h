// What the operations share: threads, data types, reading and writing of selected entries.
//
// Included by files that are compiled once per instruction set, so everything lies in the unnamed
// namespace (see dispatch.cpp). Code that uses an instruction set asks for its macro, not for
// SFT_ISA.
#ifndef SPARSE_FT_CPU_COMMON_H
#define SPARSE_FT_CPU_COMMON_H

#include "sparse_ft.h"

#include <stdint.h>
#include <string.h>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef SFT_ISA
#define SFT_ISA portable
#endif
#include "ops.inl"

namespace sft::SFT_ISA {
namespace {

// --- threads ---

// Sets round to nearest even with subnormal numbers for its lifetime, whatever the caller has chosen
// for this thread (torch.set_flush_denormal, say).
class IeeeMode {
 public:
#if defined(__x86_64__)
  IeeeMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~IeeeMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  IeeeMode() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~IeeeMode() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#else
  IeeeMode() {}
  ~IeeeMode() {}
#endif
  IeeeMode(const IeeeMode &) = delete;
  IeeeMode &operator=(const IeeeMode &) = delete;
};

// Below this many entries, waking a second thread costs more than it saves.
constexpr int64_t kSerialWork = 16384;

inline int32_t team_size(int64_t n, int32_t threads, int64_t work) {
  if (work < kSerialWork || threads < 1) return 1;
  return n < threads ? (n > 1 ? static_cast<int32_t>(n) : 1) : threads;
}

// Calls body(i, thread) for i in [0, n), in any order; work is the number of entries in all.
// No result may depend on the thread or on the order.
template <class Body>
inline void for_each(int64_t n, int32_t threads, int64_t work, const Body &body) {
  const int32_t team = team_size(n, threads, work);
  (void)team;
  // Several neighbours at a time: threads that write next to each other make each other wait, more
  // than the lines at the seams explain (merge takes 1.8 times as long, check_support 1.7; perhaps
  // the hardware fetches beyond them). At least 16 chunks a thread, so that uneven work evens out.
  int64_t chunk = n / (int64_t{16} * team);
  chunk = chunk < 1 ? 1 : chunk > 16 ? 16 : chunk;
  (void)chunk;
#if defined(_OPENMP)
#pragma omp parallel num_threads(team) if (team > 1)
#endif
  {
    const IeeeMode ieee;
#if defined(_OPENMP)
    const int32_t thread = team > 1 ? omp_get_thread_num() : 0;
#pragma omp for schedule(dynamic, chunk)
#else
    const int32_t thread = 0;
#endif
    for (int64_t i = 0; i < n; ++i) body(i, thread);
  }
}

inline int64_t add_atomically(int64_t *counter, int64_t value) {
  return __atomic_fetch_add(counter, value, __ATOMIC_RELAXED);
}

inline void lower_atomically(int64_t *least, int64_t value) {
  int64_t found = __atomic_load_n(least, __ATOMIC_RELAXED);
  while (value < found && !__atomic_compare_exchange_n(least, &found, value, true, __ATOMIC_RELAXED,
                                                       __ATOMIC_RELAXED)) {
  }
}

// Asks for a line, into the second-level cache: more requests can be under way there than into the
// first (a third less time than other hints on Zen 4). Good for lines that will be written, too:
// nobody else holds them, so they arrive exclusively.
inline void prefetch(const void *address) {
  __builtin_prefetch(address, 0, 2);
  // GCC takes a function that does nothing but prefetch for one without effect, and drops its calls.
  asm volatile("" : :);
}

// Asks for huge pages for an output that is about to be written, as numpy does for its arrays: fresh
// memory that comes in small pages can take longer to get than to fill. A hint, and Linux's only.
inline void prefer_huge_pages(void *memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kLarge = 4 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin + kLarge <= end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

// --- numbers ---

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline bool same_bits(float a, float b) { return bits_of(a) == bits_of(b); }
inline bool same_bits(uint16_t a, uint16_t b) { return a == b; }

// -1, 0 or 1; 0 for NaN, as torch.sign.
inline float sign(float x) {
  return static_cast<float>(static_cast<int>(x > 0) - static_cast<int>(x < 0));
}

inline float f32_of_bf16(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

// Round to nearest even; every NaN becomes 0x7FC0, as in torch.
inline uint16_t bf16_of_f32(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

// A NaN keeps its sign and the top bits of its payload and becomes quiet, as the F16C instruction
// does it.
inline float f32_of_f16(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const uint32_t sign_bit = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7FFF;
  if (magnitude >= 0x7C00) {
    return float_of(sign_bit | 0x7F800000 | (magnitude & 0x3FF) << 13 |
                    (magnitude > 0x7C00 ? 0x400000 : 0));
  }
  if (magnitude >= 0x400) return float_of(sign_bit | ((magnitude << 13) + (112u << 23)));
  // Subnormal: a multiple of 2^-24, which binary32 holds exactly.
  return float_of(sign_bit | bits_of(static_cast<float>(magnitude) * float_of(103u << 23)));
#endif
}

// Round to nearest even, subnormal numbers included; NaN as above.
inline uint16_t f16_of_f32(float value) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign_bit = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  uint32_t half;
  if (magnitude > 0x7F800000) {
    half = 0x7E00 | ((magnitude >> 13) & 0x3FF);
  } else if (magnitude >= 0x47800000) {  // 2^16 and more
    half = 0x7C00;
  } else if (magnitude >= 0x38800000) {  // 2^-14 and more: normal; a carry may give infinity
    half = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  } else if (magnitude >= 0x33000000) {  // 2^-25 and more: subnormal
    const uint32_t shift = 126 - (magnitude >> 23);
    const uint32_t mantissa = (magnitude & 0x7FFFFF) | 0x800000;
    const uint32_t below = mantissa & ((1u << shift) - 1);
    const uint32_t tie = 1u << (shift - 1);
    half = mantissa >> shift;
    half += below > tie || (below == tie && (half & 1));
  } else {
    half = 0;
  }
  return static_cast<uint16_t>(sign_bit | half);
#endif
}

// The data types: what an element is in memory, and conversions of contiguous elements.
struct F32 {
  using Raw = float;
  static void load(const Raw *from, int64_t n, float *to) {
    memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
  }
  static void store(const float *from, int64_t n, Raw *to) { load(from, n, to); }
};

struct BF16 {
  using Raw = uint16_t;
  static void load(const Raw *__restrict from, int64_t n, float *__restrict to) {
    for (int64_t i = 0; i < n; ++i) to[i] = f32_of_bf16(from[i]);
  }
  static void store(const float *__restrict from, int64_t n, Raw *__restrict to) {
    for (int64_t i = 0; i < n; ++i) to[i] = bf16_of_f32(from[i]);
  }
};

struct F16 {
  using Raw = uint16_t;
  static void load(const Raw *__restrict from, int64_t n, float *__restrict to) {
    int64_t i = 0;
#if defined(__AVX2__) && defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
    }
#endif
    for (; i < n; ++i) to[i] = f32_of_f16(from[i]);
  }
  static void store(const float *__restrict from, int64_t n, Raw *__restrict to) {
    int64_t i = 0;
#if defined(__AVX2__) && defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i), half);
    }
#endif
    for (; i < n; ++i) to[i] = f16_of_f32(from[i]);
  }
};

inline bool known_dtype(int32_t dtype) { return dtype >= SFT_F32 && dtype <= SFT_F16; }

// Calls body with a value of the type that belongs to a code.
template <class Body>
inline void with_dtype(int32_t dtype, const Body &body) {
  if (dtype == SFT_F32) {
    body(F32());
  } else if (dtype == SFT_BF16) {
    body(BF16());
  } else {
    body(F16());
  }
}

template <class Type>
inline typename Type::Raw *address(int64_t base) {
  return reinterpret_cast<typename Type::Raw *>(static_cast<uintptr_t>(base));
}

// n values of any type, from element `first` on, as binary32. Returns where they are: in place
// where they are binary32 already, else in buffer.
inline const float *as_floats(int32_t dtype, const void *values, int64_t first, int64_t n,
                              float *buffer) {
  if (dtype == SFT_F32) return static_cast<const float *>(values) + first;
  const uint16_t *raw = static_cast<const uint16_t *>(values) + first;
  if (dtype == SFT_BF16) {
    BF16::load(raw, n, buffer);
  } else {
    F16::load(raw, n, buffer);
  }
  return buffer;
}

// --- selected entries ---

// Entries are worked on in blocks: gathered into a buffer, computed on as vectors, scattered. While
// a block is worked on, the memory lines of the next one are on their way.
constexpr int64_t kBlock = 512;

// Calls body(first, n) for the blocks of the entries begin … end.
template <class Body>
inline void for_blocks(int64_t begin, int64_t end, const Body &body) {
  for (int64_t e = begin; e < end; e += kBlock) body(e, end - e < kBlock ? end - e : kBlock);
}

// Whether n > 0 entries, which ascend strictly, are neighbours.
inline bool contiguous(const uint16_t *idx, int64_t n) { return idx[n - 1] - idx[0] == n - 1; }

// Asks for the lines of the block after the one at `first`, of the tile whose entries are begin …
// end; at the tile's first block, for those of that one too.
template <class Raw>
inline void fetch_ahead(const Raw *tile, const uint16_t *idx, int64_t begin, int64_t first,
                        int64_t end) {
  int64_t e = first == begin ? first : first + kBlock;
  const int64_t stop = end - first < 2 * kBlock ? end : first + 2 * kBlock;
  if (e >= stop) return;
  if (contiguous(idx + e, stop - e)) {
    // Processors follow such a stream by themselves, but not while they compute on a block.
    const Raw *end = tile + idx[stop - 1] + 1;
    for (const Raw *line = tile + idx[e]; line < end; line += 64 / sizeof(Raw)) prefetch(line);
    return;
  }
  for (; e < stop; ++e) prefetch(tile + idx[e]);
}

// to[i] = from[idx[i]], i < n.
template <class Raw>
inline void gather_raw(const Raw *from, const uint16_t *idx, int64_t n, Raw *to) {
  if (contiguous(idx, n)) {
    memcpy(to, from + idx[0], static_cast<size_t>(n) * sizeof(Raw));
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    to[i] = from[idx[i]];
    // Keeps the loop scalar: gather instructions are no faster at best, and very slow on processors
    // whose gathers had to be mitigated.
    asm volatile("" : :);
  }
}

// to[idx[i]] = from[i], i < n.
template <class Raw>
inline void scatter_raw(const Raw *from, const uint16_t *idx, int64_t n, Raw *to) {
  if (contiguous(idx, n)) {
    memcpy(to + idx[0], from, static_cast<size_t>(n) * sizeof(Raw));
    return;
  }
  for (int64_t i = 0; i < n; ++i) to[idx[i]] = from[i];
}

// n <= kBlock entries of a tile from `first` on, as binary32; fetch_ahead included.
template <class Type>
inline void gather_floats(const typename Type::Raw *tile, const uint16_t *idx, int64_t begin,
                          int64_t first, int64_t end, int64_t n, float *to) {
  fetch_ahead(tile, idx, begin, first, end);
  if (contiguous(idx + first, n)) {
    Type::load(tile + idx[first], n, to);
    return;
  }
  typename Type::Raw raw[kBlock];
  gather_raw(tile, idx + first, n, raw);
  Type::load(raw, n, to);
}

// --- sums in a fixed order ---

// Three halvings at once: to[j], j < eighth, from the 8 * eighth values value(0), value(1), …
template <class Value>
inline void halve_thrice(int64_t eighth, const Value &value, double *__restrict to) {
  const auto half = [&](int64_t j) { return value(j) + value(j + 4 * eighth); };
  const auto quarter = [&](int64_t j) { return half(j) + half(j + 2 * eighth); };
  for (int64_t j = 0; j < eighth; ++j) to[j] = quarter(j) + quarter(j + eighth);
}

inline double halve_to_one(double *x, int64_t width) {
  for (int64_t half = width / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) x[j] += x[j + half];
  }
  return x[0];
}

// The sum of a run of n <= SFT_SUM_RUN values value(0), value(1), … (see sparse_ft.h).
template <class Value>
inline double run_sum(int64_t n, const Value &value) {
  static_assert(SFT_SUM_RUN == 1024);
  if (n == SFT_SUM_RUN) {
    double x[128], y[16];
    halve_thrice(128, value, x);
    halve_thrice(16, [&](int64_t i) { return x[i]; }, y);
    return halve_to_one(y, 16);
  }
  if (n <= 0) return 0;
  // Padding beyond the next power of two is left out: x + 0 = x, but for the sign of a zero, and no
  // sum here can end as -0.
  int64_t width = 1;
  while (width < n) width *= 2;
  double x[SFT_SUM_RUN];
  for (int64_t i = 0; i < n; ++i) x[i] = value(i);
  for (int64_t i = n; i < width; ++i) x[i] = 0;
  return halve_to_one(x, width);
}

// tree_sum of n values that are not negative (see sparse_ft.h); they are overwritten.
inline double tree_sum(double *x, int64_t n) {
  if (n == 0) return 0;
  while (n > 1) {
    int64_t n_runs = 0;
    for (int64_t first = 0; first < n; first += SFT_SUM_RUN) {
      const int64_t length = n - first < SFT_SUM_RUN ? n - first : SFT_SUM_RUN;
      x[n_runs++] = run_sum(length, [&](int64_t i) { return x[first + i]; });
    }
    n = n_runs;
  }
  return x[0];
}

// --- arguments ---

inline bool valid_tiles(const sft_tiles *tiles) {
  return tiles && tiles->n >= 0 &&
         (tiles->n == 0 || (tiles->base && tiles->length && tiles->dtype));
}

}  // namespace
}  // namespace sft::SFT_ISA

#endif
