// Exact selection of the k largest keys of a model, for select_topk and select_random.
//
// A key is 31 bits; an entry that is excluded has the key kNone, which is less than all. `Source`
// makes the keys: keys(tile, first, n, out); bounds(selection, room), of step 1.
//
// find, in the usual case one read of the model:
//   1. bounds   A sample of short runs at random places (or theory, for random keys) gives a low
//               bound L, below the threshold T almost surely, that about k keys exceed. Where k is
//               a large part of N, also a high bound H >= T.
//   2. sweep    Every key is read once. Keys in (L, H] are stored as candidates; of keys equal to L
//               and of keys above H only the number per tile is kept. So a mass of ties at T (bf16)
//               costs no memory: then L = T.
//   3. select   T is the right rank among the candidates, or L itself.
//   4. count    Per tile, the entries > T and = T; the lower tiles take the ties; prefix sums: ptr.
// If the bounds did not hold, or the candidates did not fit, T is found by radix over all keys (three
// reads) and the sweep repeated with L = T, which cannot fail. The result is the same.
//
// emit reads the candidates of a tile again, or the tile where its candidates do not tell
// everything: it has keys above H, or it takes ties at L.
//
// Candidates lie in blocks that threads take from a common pool and chain: a tile's candidates are
// the next `stored` ones from `start` along the chain, in ascending order. Nothing depends on which
// thread sweeps which tile.
#ifndef SPARSE_FT_CPU_SELECT_H
#define SPARSE_FT_CPU_SELECT_H

#include "common.h"

namespace sft::SFT_ISA {
namespace {

constexpr int32_t kNone = INT32_MIN;
constexpr int32_t kNoLimit = INT32_MAX;
constexpr int32_t kInfinity = 0x7F800000;

constexpr int32_t kStrip = 1024;  // keys worked on at a time
constexpr int32_t kSlack = 32;    // what compress may write beyond its result
constexpr int32_t kBlockEntries = 2048;
constexpr int32_t kBins = 2048;
constexpr int64_t kNowhere = -1;

// --- keys of a strip ---

struct StripCounts {
  int32_t at_low, above, largest;
};

// n is rounded up to a multiple of 16; the keys beyond n are kNone.
inline StripCounts count_keys(const int32_t *__restrict key, int32_t n, int32_t low, int32_t high) {
  int32_t at_low = 0, above = 0, largest = kNone;
  const int32_t end = (n + 15) & ~15;
  for (int32_t i = 0; i < end; ++i) {
    at_low += key[i] == low;
    above += key[i] > high;
    largest = largest > key[i] ? largest : key[i];
  }
  return {at_low, above, largest};
}

#if defined(__AVX2__) && !defined(__AVX512VBMI2__)
// For each mask of eight lanes: the lanes that are set, in order.
struct LaneTable {
  uint8_t lane[256][8];
  constexpr LaneTable() : lane() {
    for (int mask = 0; mask < 256; ++mask) {
      int n = 0;
      for (int i = 0; i < 8; ++i) {
        if (mask >> i & 1) lane[mask][n++] = static_cast<uint8_t>(i);
      }
    }
  }
};
constexpr LaneTable kLanes;
#endif

// Writes keys in (low, high] and their offsets (first + place), in order; returns how many. The
// keys beyond n, up to a multiple of 16, are kNone. Up to kSlack values more may be overwritten.
inline int32_t compress(const int32_t *__restrict key, int32_t n, int32_t first, int32_t low,
                        int32_t high, int32_t *__restrict out_key,
                        uint16_t *__restrict out_offset) {
  int32_t found = 0;
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m512i low_v = _mm512_set1_epi32(low), high_v = _mm512_set1_epi32(high);
  const __m256i step = _mm256_set1_epi16(16);
  __m256i offset =
      _mm256_add_epi16(_mm256_set1_epi16(static_cast<int16_t>(first)),
                       _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int32_t i = 0; i < n; i += 16) {
    const __m512i k = _mm512_loadu_si512(key + i);
    const __mmask16 take =
        _mm512_mask_cmple_epi32_mask(_mm512_cmpgt_epi32_mask(k, low_v), k, high_v);
    // Compressed in a register: the form that stores to memory is slow on some processors.
    _mm512_storeu_si512(out_key + found, _mm512_maskz_compress_epi32(take, k));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out_offset + found),
                        _mm256_maskz_compress_epi16(take, offset));
    found += __builtin_popcount(take);
    offset = _mm256_add_epi16(offset, step);
  }
#elif defined(__AVX2__)
  const __m256i low_v = _mm256_set1_epi32(low), high_v = _mm256_set1_epi32(high);
  for (int32_t i = 0; i < n; i += 8) {
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(key + i));
    const __m256i take_v =
        _mm256_andnot_si256(_mm256_cmpgt_epi32(k, high_v), _mm256_cmpgt_epi32(k, low_v));
    const int32_t take = _mm256_movemask_ps(_mm256_castsi256_ps(take_v));
    if (take) {
      const __m128i lane8 = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(kLanes.lane[take]));
      const __m256i lanes = _mm256_cvtepu8_epi32(lane8);
      const __m128i offsets =
          _mm_add_epi16(_mm_set1_epi16(static_cast<int16_t>(first + i)), _mm_cvtepu8_epi16(lane8));
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(out_key + found),
                          _mm256_permutevar8x32_epi32(k, lanes));
      _mm_storeu_si128(reinterpret_cast<__m128i *>(out_offset + found), offsets);
      found += __builtin_popcount(static_cast<unsigned>(take));
    }
  }
#else
  for (int32_t group = 0; group < n; group += 16) {
    int32_t largest = kNone;
    for (int32_t i = group; i < group + 16; ++i) largest = largest > key[i] ? largest : key[i];
    if (largest <= low) continue;
    for (int32_t i = group; i < group + 16; ++i) {
      out_key[found] = key[i];
      out_offset[found] = static_cast<uint16_t>(first + i);
      found += (key[i] > low) & (key[i] <= high);
    }
  }
#endif
  return found;
}

// --- workspace ---

struct Tile {
  int64_t start;   // of its candidates: block * kBlockEntries + place; while sampling: first entry
  int32_t stored;  // candidates
  int32_t above;   // keys > H
  int32_t at_low;  // keys = L
  int32_t ties;    // ties at T that it takes: kAllTies, or a number less than there are
};

constexpr int32_t kAllTies = -1;

struct Block {
  int32_t key[kBlockEntries + kSlack];
  uint16_t offset[kBlockEntries + kSlack];
};

struct alignas(64) Writer {  // one a thread: where its next candidate goes
  int64_t block;
  int64_t place;
  bool full;
};

struct Header {
  int64_t blocks_used;  // may exceed the blocks that there are
  int32_t low, threshold;
};

struct Workspace {
  int64_t n_blocks;
  Header *header;
  Writer *writers;  // [threads]
  uint64_t *bins;   // [threads][kBins]
  Tile *tiles;      // [n]
  int32_t *next;    // [n_blocks]
  int32_t *used;    // [n_blocks]
  Block *blocks;    // [n_blocks]; the sample, while there is one
  int64_t bytes;
};

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Candidates for which there is room. Where k is a large part of all entries, what counts is the
// distance between the bounds.
inline int64_t capacity(int64_t n_tiles, int64_t k) {
  const int64_t most = n_tiles * SFT_TILE;
  if (k > most) k = most;
  const int64_t wanted = (k > most / 5 ? most / 32 : k + k / 2) + SFT_TILE;
  return wanted < most ? wanted : most;
}

inline Workspace lay_out(void *memory, int64_t n_tiles, int64_t k, int32_t threads) {
  Workspace ws;
  uint8_t *base = static_cast<uint8_t *>(memory);
  int64_t at = 0;
  // Only addresses are made here, so a null base (to ask for the size) is harmless.
  const auto take = [&](int64_t bytes) {
    const int64_t start = at;
    at += round_up(bytes, 64);
    return start;
  };
  ws.n_blocks = round_up(capacity(n_tiles, k), kBlockEntries) / kBlockEntries + threads;
  const int64_t header = take(sizeof(Header));
  const int64_t writers = take(threads * int64_t{sizeof(Writer)});
  const int64_t bins = take(threads * int64_t{kBins * sizeof(uint64_t)});
  const int64_t tiles = take(n_tiles * int64_t{sizeof(Tile)});
  const int64_t next = take(ws.n_blocks * int64_t{sizeof(int32_t)});
  const int64_t used = take(ws.n_blocks * int64_t{sizeof(int32_t)});
  const int64_t blocks = take(ws.n_blocks * int64_t{sizeof(Block)});
  ws.bytes = at + 64;  // the caller's memory may begin anywhere
  if (base) {
    base += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64;
    ws.header = reinterpret_cast<Header *>(base + header);
    ws.writers = reinterpret_cast<Writer *>(base + writers);
    ws.bins = reinterpret_cast<uint64_t *>(base + bins);
    ws.tiles = reinterpret_cast<Tile *>(base + tiles);
    ws.next = reinterpret_cast<int32_t *>(base + next);
    ws.used = reinterpret_cast<int32_t *>(base + used);
    ws.blocks = reinterpret_cast<Block *>(base + blocks);
  }
  return ws;
}

inline int64_t workspace_size(int64_t n_tiles, int64_t k, int32_t threads) {
  if (n_tiles < 0 || k < 0) return 0;
  return lay_out(nullptr, n_tiles, k, threads < 1 ? 1 : threads).bytes;
}

// --- rank by radix ---

struct Rank {
  int32_t key;
  int64_t greater;  // keys > key
};

// The key at a rank (1 is the largest) among the keys that visit(i, use), i < n, hands to
// use(keys, count) piece by piece; at least `rank` keys must be there. All keys lie in
// [least, most], or else [least, most] is [0, kNoLimit] and keys that are kNone do not count.
// Up to three passes; the first spreads the keys over the bins as far as their range allows.
template <class Visit>
inline Rank key_at_rank(int64_t n, int32_t threads, int64_t work, uint64_t *bins, int64_t rank,
                        int32_t least, int32_t most, const Visit &visit) {
  constexpr int32_t kDigit = 11;
  const int32_t team = team_size(n, threads, work);
  const uint32_t base = static_cast<uint32_t>(least);
  const uint32_t span = static_cast<uint32_t>(most) - base;
  int32_t shift = span == 0 ? 0 : 32 - __builtin_clz(span);
  uint32_t prefix = 0;
  int64_t greater = 0;
  while (shift > 0) {
    const int32_t high = shift;
    const int32_t width = shift < kDigit ? shift : kDigit;
    shift -= width;
    const uint32_t mask = (1u << width) - 1;
    memset(bins, 0, static_cast<size_t>(team) * kBins * sizeof(uint64_t));
    for_each(n, threads, work, [&](int64_t i, int32_t thread) {
      uint64_t *mine = bins + int64_t{thread} * kBins;
      visit(i, [&](const int32_t *key, int64_t count) {
        for (int64_t e = 0; e < count; ++e) {
          const uint32_t value = static_cast<uint32_t>(key[e]) - base;
          if (value >> high == prefix) ++mine[(value >> shift) & mask];
        }
      });
    });
    for (int32_t thread = 1; thread < team; ++thread) {
      for (uint32_t i = 0; i <= mask; ++i) bins[i] += bins[int64_t{thread} * kBins + i];
    }
    uint32_t i = mask;
    for (; i > 0 && greater + static_cast<int64_t>(bins[i]) < rank; --i) {
      greater += static_cast<int64_t>(bins[i]);
    }
    prefix = prefix << width | i;
  }
  return {static_cast<int32_t>(base + prefix), greater};
}

// --- the problem ---

struct Bounds {
  int32_t low, high;
};

template <class Source>
struct Selection {
  Source source;
  const int32_t *length;
  int64_t n;
  int64_t k;
  const uint16_t *exclude_idx;
  const int64_t *exclude_ptr;
  int32_t threads;
  int64_t total = 0;     // entries
  int64_t eligible = 0;  // entries not excluded
  Workspace ws = {};

  // The keys first … first + n of a tile, kNone where excluded; filled up with kNone to a multiple
  // of 16. `excluded` is the tile's first exclusion not before `first`, and moves on.
  void read(int64_t t, int32_t first, int32_t count, int32_t *key, int64_t *excluded) const {
    source.keys(t, first, count, key);
    for (int32_t i = count; i & 15; ++i) key[i] = kNone;
    if (!exclude_idx) return;
    const int64_t end = exclude_ptr[t + 1];
    int64_t e = *excluded;
    for (; e < end && exclude_idx[e] < first + count; ++e) key[exclude_idx[e] - first] = kNone;
    *excluded = e;
  }

  int64_t first_exclusion(int64_t t) const { return exclude_idx ? exclude_ptr[t] : 0; }

  // The tile's first exclusion at or after an offset.
  int64_t first_exclusion(int64_t t, int32_t offset) const {
    if (!exclude_idx) return 0;
    int64_t from = exclude_ptr[t], to = exclude_ptr[t + 1];
    while (from < to) {
      const int64_t middle = from + (to - from) / 2;
      if (exclude_idx[middle] < offset) {
        from = middle + 1;
      } else {
        to = middle;
      }
    }
    return from;
  }

  // Calls use(keys, count, first) for the strips of a tile until it returns false.
  template <class Use>
  void strips(int64_t t, const Use &use) const {
    alignas(64) int32_t key[kStrip];
    int64_t excluded = first_exclusion(t);
    for (int32_t first = 0; first < length[t]; first += kStrip) {
      const int32_t count = length[t] - first < kStrip ? length[t] - first : kStrip;
      read(t, first, count, key, &excluded);
      if (!use(key, count, first)) return;
    }
  }

  int64_t place(int64_t block, int64_t at) const { return block * kBlockEntries + at; }

  // Takes a block from the pool; false where it is empty.
  bool take_block(Writer *writer) const {
    const int64_t block = add_atomically(&ws.header->blocks_used, 1);
    if (block >= ws.n_blocks) {
      writer->full = true;
      return false;
    }
    if (writer->block != kNowhere) ws.next[writer->block] = static_cast<int32_t>(block);
    writer->block = block;
    writer->place = 0;
    ws.used[block] = 0;
    return true;
  }

  // Stores the keys of a strip that lie in (L, H]; returns how many there were.
  int32_t store(Writer *writer, const int32_t *key, int32_t count, int32_t first, Bounds bounds,
                Tile *tile) const {
    if (writer->full) return 0;
    const bool any_room = writer->block != kNowhere && writer->place < kBlockEntries;
    if (!any_room && !take_block(writer)) return 0;
    if (!tile->stored) tile->start = place(writer->block, writer->place);
    Block *block = &ws.blocks[writer->block];
    if (kBlockEntries - writer->place >= count) {
      const int32_t found = compress(key, count, first, bounds.low, bounds.high,
                                     block->key + writer->place, block->offset + writer->place);
      writer->place += found;
      ws.used[writer->block] = static_cast<int32_t>(writer->place);
      return found;
    }
    int32_t keys[kStrip + kSlack];
    uint16_t offsets[kStrip + kSlack];
    const int32_t found = compress(key, count, first, bounds.low, bounds.high, keys, offsets);
    for (int32_t done = 0; done < found;) {
      if (writer->place == kBlockEntries && !take_block(writer)) return done;
      block = &ws.blocks[writer->block];
      const int64_t room = kBlockEntries - writer->place;
      const int32_t some = found - done < room ? found - done : static_cast<int32_t>(room);
      memcpy(block->key + writer->place, keys + done, static_cast<size_t>(some) * sizeof(int32_t));
      memcpy(block->offset + writer->place, offsets + done,
             static_cast<size_t>(some) * sizeof(uint16_t));
      writer->place += some;
      ws.used[writer->block] = static_cast<int32_t>(writer->place);
      done += some;
    }
    return found;
  }

  struct Swept {
    int64_t stored, above, at_low;
    bool full;
    int32_t largest;   // key
    int64_t bad_tile;  // the first that holds a key of NaN or infinity; n where none does
  };

  Swept sweep(Bounds bounds) const {
    ws.header->blocks_used = 0;
    ws.header->low = bounds.low;
    for (int32_t i = 0; i < threads; ++i) ws.writers[i] = {kNowhere, 0, false};
    int64_t bad_tile = n, least_negated = -int64_t{kNone};
    for_each(n, threads, total, [&](int64_t t, int32_t thread) {
      Tile tile = {0, 0, 0, 0, 0};
      Writer *writer = &ws.writers[thread];
      int32_t largest = kNone;
      strips(t, [&](const int32_t *key, int32_t count, int32_t first) {
        const StripCounts counts = count_keys(key, count, bounds.low, bounds.high);
        tile.at_low += counts.at_low;
        tile.above += counts.above;
        largest = largest > counts.largest ? largest : counts.largest;
        if (counts.largest > bounds.low && bounds.high > bounds.low) {
          tile.stored += store(writer, key, count, first, bounds, &tile);
        }
        return true;
      });
      ws.tiles[t] = tile;
      lower_atomically(&least_negated, -int64_t{largest});
      if (Source::kMayBeInfinite && largest >= kInfinity) lower_atomically(&bad_tile, t);
    });
    Swept swept = {
        0,       0, 0, ws.header->blocks_used > ws.n_blocks, static_cast<int32_t>(-least_negated),
        bad_tile};
    for (int64_t t = 0; t < n; ++t) {
      swept.stored += ws.tiles[t].stored;
      swept.above += ws.tiles[t].above;
      swept.at_low += ws.tiles[t].at_low;
    }
    return swept;
  }

  // Calls use(keys, offsets, count) for the pieces of a tile's candidates until it returns false.
  template <class Use>
  void candidates(int64_t t, const Use &use) const {
    const Tile &tile = ws.tiles[t];
    int64_t block = tile.start / kBlockEntries, at = tile.start % kBlockEntries;
    for (int32_t left = tile.stored; left > 0;) {
      const int64_t room = kBlockEntries - at;
      const int32_t count = left < room ? left : static_cast<int32_t>(room);
      if (!use(ws.blocks[block].key + at, ws.blocks[block].offset + at, count)) return;
      left -= count;
      at = 0;
      if (left > 0) block = ws.next[block];
    }
  }

  Rank candidate_at_rank(int64_t rank, int64_t stored, int32_t least, int32_t most) const {
    return key_at_rank(ws.header->blocks_used, threads, stored, ws.bins, rank, least, most,
                       [&](int64_t i, const auto &use) { use(ws.blocks[i].key, ws.used[i]); });
  }

  Rank exact_at_rank(int64_t rank) const {
    return key_at_rank(n, threads, total, ws.bins, rank, 0, kNoLimit,
                       [&](int64_t t, const auto &use) {
                         strips(t, [&](const int32_t *key, int32_t count, int32_t) {
                           use(key, count);
                           return true;
                         });
                       });
  }

  int32_t finish(int32_t status, int64_t *info) const {
    info[7] = eligible;
    return status;
  }

  // The arguments are valid; the workspace is large enough.
  int32_t find(bool ties_all, int64_t *ptr, int64_t *info) {
    for (int64_t t = 0; t < n; ++t) total += length[t];
    eligible = total - (exclude_idx ? exclude_ptr[n] : 0);
    memset(info, 0, 8 * sizeof(int64_t));
    info[5] = -1;
    info[7] = eligible;
    memset(ptr, 0, static_cast<size_t>(n + 1) * sizeof(int64_t));
    if (k > eligible) return SFT_TOO_FEW;
    if (k == 0 && !Source::kMayBeInfinite) return SFT_OK;

    const int64_t room = capacity(n, k);
    Bounds bounds = {-1, kNoLimit};
    if (k == 0) {
      bounds.low = kNoLimit;
    } else if (total > room) {
      bounds = source.bounds(*this, room);
    }
    Swept swept = sweep(bounds);
    if (swept.bad_tile < n) {
      info[5] = swept.bad_tile;
      return SFT_NONFINITE;
    }
    if (k == 0) return SFT_OK;

    int64_t wanted = k - swept.above;  // the rank of T among the candidates
    int32_t threshold;
    if (swept.full || wanted < 1 || wanted > swept.stored + swept.at_low) {
      info[6] = 1;
      const Rank exact = exact_at_rank(k);
      threshold = exact.key;
      bounds = {threshold, exact.greater <= room ? kNoLimit : threshold};
      swept = sweep(bounds);
    } else if (wanted > swept.stored) {
      threshold = bounds.low;
    } else {
      threshold = candidate_at_rank(wanted, swept.stored, bounds.low + 1,
                                    swept.largest < bounds.high ? swept.largest : bounds.high)
                      .key;
    }
    ws.header->threshold = threshold;

    // Per tile, entries > T (kept in ptr for the moment) and = T.
    for_each(n, threads, swept.stored, [&](int64_t t, int32_t) {
      Tile *tile = &ws.tiles[t];
      int64_t greater = tile->above;
      int32_t equal = 0;
      if (threshold == bounds.low) {
        greater += tile->stored;
        equal = tile->at_low;
      } else {
        candidates(t, [&](const int32_t *key, const uint16_t *, int32_t count) {
          int32_t more = 0, same = 0;
          for (int32_t i = 0; i < count; ++i) {
            more += key[i] > threshold;
            same += key[i] == threshold;
          }
          greater += more;
          equal += same;
          return true;
        });
      }
      ptr[t + 1] = greater;
      tile->ties = equal;
    });
    int64_t greater = 0, equal = 0;
    for (int64_t t = 0; t < n; ++t) {
      greater += ptr[t + 1];
      equal += ws.tiles[t].ties;
    }
    const int64_t quota = ties_all ? equal : k - greater;
    int64_t left = quota;
    for (int64_t t = 0; t < n; ++t) {
      Tile *tile = &ws.tiles[t];
      const int32_t tied = tile->ties;
      const int64_t taken = tied < left ? tied : left;
      left -= taken;
      ptr[t + 1] += ptr[t] + taken;
      tile->ties = taken > 0 && taken == tied ? kAllTies : static_cast<int32_t>(taken);
    }
    info[0] = threshold;
    info[1] = ptr[n];
    info[2] = greater;
    info[3] = equal;
    info[4] = quota;
    return SFT_OK;
  }

  int32_t emit(const int64_t *ptr, uint16_t *idx) const {
    const int32_t threshold = ws.header->threshold;
    for_each(n, threads, ptr[n], [&](int64_t t, int32_t) {
      uint16_t *out = idx + ptr[t];
      uint16_t *const end = idx + ptr[t + 1];
      if (out == end) return;
      const Tile &tile = ws.tiles[t];
      const bool some_ties = tile.ties != 0;
      int32_t ties_left = tile.ties == kAllTies ? SFT_TILE : tile.ties;
      // Nothing is written at `end`, where the next tile begins.
      const auto pick = [&](const int32_t *key, const uint16_t *offset, int32_t count) {
        for (int32_t i = 0; i < count && out < end; ++i) {
          const bool tied = (key[i] == threshold) & (ties_left > 0);
          *out = offset[i];
          ties_left -= tied;
          out += (key[i] > threshold) | tied;
        }
        return out < end;
      };
      if (tile.above == 0 && (threshold > ws.header->low || !some_ties)) {
        candidates(t, pick);
        return;
      }
      const int32_t low = some_ties ? threshold - 1 : threshold;
      strips(t, [&](const int32_t *key, int32_t count, int32_t first) {
        int32_t keys[kStrip + kSlack];
        uint16_t offsets[kStrip + kSlack];
        const int32_t found = compress(key, count, first, low, kNoLimit, keys, offsets);
        if (some_ties && tile.ties != kAllTies) return pick(keys, offsets, found);
        memcpy(out, offsets, static_cast<size_t>(found) * sizeof(uint16_t));
        out += found;
        return out < end;
      });
    });
    return SFT_OK;
  }
};

// What the two operations check alike.
inline int32_t check_selection(const int32_t *length, int64_t n, int64_t k,
                               const uint16_t *exclude_idx, const int64_t *exclude_ptr,
                               const int64_t *ptr, const int64_t *info, const void *workspace,
                               int64_t workspace_bytes, int32_t threads) {
  if (n < 0 || k < 0 || (n > 0 && !length) || !ptr || !info || !workspace) return SFT_BAD_ARGUMENT;
  if (exclude_idx && !exclude_ptr) return SFT_BAD_ARGUMENT;
  return workspace_bytes < workspace_size(n, k, threads) ? SFT_WORKSPACE : SFT_OK;
}

}  // namespace
}  // namespace sft::SFT_ISA

#endif
