// select_topk: the k largest |a - b| over all tensors of a model, exactly; see select.h.
//
// Key: the 31 magnitude bits of the binary32 difference, which order as the magnitudes do.
//
// Moves: a and b once (up to five times in the fallback); 6 bytes a candidate, about 1.2 k of them,
// a few times in cache; 2 bytes of idx an entry.
#include "mix.h"
#include "select.h"

#include <math.h>

namespace sft::SFT_ISA {
namespace {

// kLanes values as binary32.
typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));

inline Floats load_floats(F32, const float *from) {
  Floats x;
  memcpy(&x, from, sizeof x);
  return x;
}

inline Floats load_floats(BF16, const uint16_t *from) {
  Offsets half;
  memcpy(&half, from, sizeof half);
#if defined(SFT_SELECT_AVX512)  // GCC widens in pieces
  const Lanes wide = (Lanes)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)half);
#else
  const Lanes wide = __builtin_convertvector(half, Lanes);
#endif
  return (Floats)(wide << 16);
}

inline Floats load_floats(F16, const uint16_t *from) {
#if defined(SFT_SELECT_AVX512)
  return (Floats)_mm512_maskz_cvtph_ps(0xFFFF,
                                       _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
#else
  Floats x;
  for (int32_t i = 0; i < kLanes; ++i) x[i] = f32_of_f16(from[i]);
  return x;
#endif
}

struct Magnitudes {
  static constexpr bool kMayBeInfinite = true;
  static constexpr bool kLoads = true;

  const sft_tiles *a;
  const sft_tiles *b;

  void keys(int64_t t, int32_t first, int32_t n, int32_t *__restrict key) const {
    float a_buffer[kStrip], b_buffer[kStrip];
    const float *x = as_floats(a->dtype[t], address<F32>(a->base[t]), first, n, a_buffer);
    if (!b) {
      for (int32_t i = 0; i < n; ++i) key[i] = static_cast<int32_t>(bits_of(x[i]) & 0x7FFFFFFF);
      return;
    }
    const float *y = as_floats(b->dtype[t], address<F32>(b->base[t]), first, n, b_buffer);
    for (int32_t i = 0; i < n; ++i)
      key[i] = static_cast<int32_t>(bits_of(x[i] - y[i]) & 0x7FFFFFFF);
  }

  // Calls use(load), where load(i) gives the keys from first + i on.
  template <class Use>
  void with_load(int64_t t, int32_t first, const Use &use) const {
    with_dtype(a->dtype[t], [&](auto type_a) {
      using A = decltype(type_a);
      const typename A::Raw *x = address<A>(a->base[t]) + first;
      if (!b) {
        use([x](int32_t i) { return (Lanes)load_floats(A(), x + i) & 0x7FFFFFFF; });
        return;
      }
      with_dtype(b->dtype[t], [&](auto type_b) {
        using B = decltype(type_b);
        const typename B::Raw *y = address<B>(b->base[t]) + first;
        use([x, y](int32_t i) {
          return (Lanes)(load_floats(A(), x + i) - load_floats(B(), y + i)) & 0x7FFFFFFF;
        });
      });
    });
  }

  void prefetch_run(int64_t t, int64_t first) const {
    const int64_t width_a = a->dtype[t] == SFT_F32 ? 4 : 2;
    prefetch(reinterpret_cast<const char *>(address<F32>(a->base[t])) + first * width_a);
    if (!b) return;
    const int64_t width_b = b->dtype[t] == SFT_F32 ? 4 : 2;
    prefetch(reinterpret_cast<const char *>(address<F32>(b->base[t])) + first * width_b);
  }

  Bounds bounds(const Selection<Magnitudes> &s, int64_t room) const;
};

constexpr int32_t kRun = 16;  // neighbours in the sample
constexpr int64_t kMinSample = 1 << 17, kMaxSample = 1 << 20;

// A sample of the keys: the model is cut into equal cells, and from each a run of neighbours is
// read that lies in it at random, so that no period in the data can mislead.
struct Sample {
  int32_t *keys;  // [n_runs][kRun], kNone where excluded or missing
  int64_t n_runs;
  int64_t sampled;  // entries, with those excluded

  Sample(const Selection<Magnitudes> &s) : keys(reinterpret_cast<int32_t *>(s.ws.blocks)) {
    const int64_t room = s.ws.n_blocks * int64_t{sizeof(Block)} / int64_t{kRun * sizeof(int32_t)};
    int64_t most = s.total / 512;
    most = (most < kMinSample ? kMinSample : most > kMaxSample ? kMaxSample : most) / kRun;
    most = most < room ? most : room;
    const int64_t cell = round_up((s.total + most - 1) / most, kRun);
    n_runs = (s.total + cell - 1) / cell;
    sampled = 0;
    // A run begins where its cell's place says, in the tile that holds that place. Only the last
    // cell, which is cut off, may have its place beyond the model.
    for (int32_t i = 0; i < kRun; ++i) keys[(n_runs - 1) * kRun + i] = kNone;
    const auto place = [cell](int64_t c) {
      const uint64_t random = mix(static_cast<uint64_t>(c + 1) * kPosition) >> 32;
      return c * cell + static_cast<int64_t>(random % static_cast<uint64_t>(cell));
    };
    int64_t start = 0;
    for (int64_t t = 0; t < s.n; ++t) {
      s.ws.tiles[t].start = start;
      start += s.length[t];
    }
    for_each(s.n, s.threads, n_runs * kRun, [&](int64_t t, int32_t) {
      const int64_t begin = s.ws.tiles[t].start, end = begin + s.length[t];
      int64_t read = 0;
      for (int64_t c = begin / cell; c * cell < end; ++c) {
        const int64_t soon = place(c + 8);
        if (soon < end) s.source.prefetch_run(t, soon - begin);
        const int64_t at = place(c);
        if (at < begin || at >= end) continue;
        const int32_t first = static_cast<int32_t>((at - begin) / kRun * kRun);
        const int32_t left = s.length[t] - first;
        const int32_t count = left < kRun ? left : kRun;
        int64_t excluded = s.first_exclusion(t, first);
        s.read(t, first, count, keys + c * kRun, &excluded);
        read += count;
      }
      if (read) add_atomically(&sampled, read);
    });
  }

  // The key at a rank, which is at most that of the last key.
  int32_t at_rank(const Selection<Magnitudes> &s, int64_t rank) const {
    constexpr int64_t kPiece = 4096;
    const int64_t n = n_runs * kRun;
    return key_at_rank((n + kPiece - 1) / kPiece, s.threads, n, s.ws.bins, rank, 0, kNoLimit,
                       [&](int64_t i, const auto &use) {
                         const int64_t left = n - i * kPiece;
                         use(keys + i * kPiece,
                             static_cast<int32_t>(left < kPiece ? left : kPiece));
                       })
        .key;
  }

  // How many sampled keys reach `least`, and the standard error of that number. Entries that are
  // alike often lie together, so it is measured between runs.
  int64_t count(int32_t least, double *error) const {
    int64_t sum = 0, squares = 0;
    for (int64_t r = 0; r < n_runs; ++r) {
      int32_t hits = 0;
      for (int32_t i = 0; i < kRun; ++i) hits += keys[r * kRun + i] >= least;
      sum += hits;
      squares += hits * hits;
    }
    const double mean = static_cast<double>(sum) / static_cast<double>(n_runs);
    const double variance = static_cast<double>(squares) - mean * static_cast<double>(sum);
    *error = sqrt(variance > 0 ? variance : 0);
    return sum;
  }
};

Bounds Magnitudes::bounds(const Selection<Magnitudes> &s, int64_t room) const {
  const Sample sample(s);
  double error = 0;
  const int64_t there = sample.count(0, &error);
  if (there == 0) return {-1, kNoLimit, kNoLimit};
  const double share = static_cast<double>(sample.sampled) / static_cast<double>(s.total);
  const double rank = static_cast<double>(s.k) * share;
  int64_t nearest = static_cast<int64_t>(rank) + 1;
  nearest = nearest < there ? nearest : there;
  sample.count(sample.at_rank(s, nearest), &error);
  const double margin = 4 * error + 8;

  const int64_t low_rank = static_cast<int64_t>(rank + margin);
  const int64_t high_rank = static_cast<int64_t>(rank - margin);
  const int32_t low = low_rank < there ? sample.at_rank(s, low_rank) : -1;
  const int32_t high = high_rank >= 1 ? sample.at_rank(s, high_rank) : kNoLimit;
  const bool many = s.k > s.total / 5 || (rank + margin) / share > 0.9 * static_cast<double>(room);
  return {low, high, many ? high : kNoLimit};
}

using TopK = Selection<Magnitudes>;

bool valid(const sft_tiles *a, const sft_tiles *b) {
  if (!valid_tiles(a) || (b && (!valid_tiles(b) || b->n != a->n))) return false;
  for (int64_t t = 0; t < a->n; ++t) {
    if (!a->base[t] || !known_dtype(a->dtype[t])) return false;
    if (b && (!b->base[t] || !known_dtype(b->dtype[t]) || b->length[t] != a->length[t])) {
      return false;
    }
  }
  return true;
}

}  // namespace

int64_t select_topk_workspace_bytes(int64_t n_tiles, int64_t k, int64_t, int32_t threads) {
  return workspace_size(n_tiles, k, threads);
}

int32_t select_topk_find(const sft_tiles *a, const sft_tiles *b, int64_t k,
                         const uint16_t *exclude_idx, const int64_t *exclude_ptr, int32_t tie,
                         int64_t *ptr, int64_t *info, void *workspace, int64_t workspace_bytes,
                         int32_t threads) {
  if (!valid(a, b) || (tie != SFT_TIE_INDEX && tie != SFT_TIE_ALL)) return SFT_BAD_ARGUMENT;
  threads = threads < 1 ? 1 : threads;
  const int32_t status = check_selection(a->length, a->n, k, exclude_idx, exclude_ptr, ptr, info,
                                         workspace, workspace_bytes, threads);
  if (status != SFT_OK) return status;
  TopK selection = {{a, b}, a->length, a->n, k, exclude_idx, exclude_ptr, threads};
  selection.ws = lay_out(workspace, a->n, k, threads);
  prefer_huge_pages(workspace, workspace_bytes);
  return selection.find(tie == SFT_TIE_ALL, ptr, info);
}

int32_t select_topk_emit(const sft_tiles *a, const sft_tiles *b, int64_t k,
                         const uint16_t *exclude_idx, const int64_t *exclude_ptr, int32_t,
                         const int64_t *ptr, const int64_t *info, void *workspace,
                         int64_t workspace_bytes, uint16_t *idx, int32_t threads) {
  if (!valid(a, b)) return SFT_BAD_ARGUMENT;
  threads = threads < 1 ? 1 : threads;
  const int32_t status = check_selection(a->length, a->n, k, exclude_idx, exclude_ptr, ptr, info,
                                         workspace, workspace_bytes, threads);
  if (status != SFT_OK) return status;
  if (ptr[a->n] == 0) return SFT_OK;
  if (!idx) return SFT_BAD_ARGUMENT;
  TopK selection = {{a, b}, a->length, a->n, k, exclude_idx, exclude_ptr, threads};
  selection.ws = lay_out(workspace, a->n, k, threads);
  prefer_huge_pages(idx, 2 * ptr[a->n]);
  return selection.emit(ptr, idx);
}

}  // namespace sft::SFT_ISA
