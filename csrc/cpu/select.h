// Exact selection of the k largest keys of a model, for select_topk and select_random.
//
// A key is 31 bits; an entry that is excluded has the key kNone, which is less than all. `Source`
// makes the keys: keys(tile, first, n, out); with_load(tile, first, use), where kLoads, for as many
// at once as an instruction takes; bounds(selection, room), of step 1.
//
// find, in the usual case one read of the model:
//   1. bounds   A sample of short runs at random places (or theory, for random keys) gives bounds
//               L <= T <= H of the threshold T that hold almost surely. About k keys exceed L.
//   2. sweep    Every key is read once, and never written but where it reaches L. Keys > L are
//               stored as candidates; where k is a large part of N, only those <= H. Of keys equal
//               to L, and of those > H that are not stored, the number per tile is kept. So a mass
//               of ties at T (bf16) costs no memory: then L = T.
//   3. select   T is the right rank among the few candidates in (L, H], or L itself.
//   4. count    Per tile, the entries > T and = T; the lower tiles take the ties; prefix sums: ptr.
// If the bounds did not hold, or the candidates did not fit, T is found by radix over all keys
// (three reads) and the sweep repeated with L = T, which cannot fail. The result is the same.
//
// emit reads the candidates of a tile again, or the tile where its candidates do not tell
// everything: it has keys above H that are not stored, or it takes ties at L.
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
constexpr int32_t kBlockEntries = 2048;
constexpr int32_t kBins = 2048;
constexpr int64_t kNowhere = -1;

// --- vectors of keys ---

// As many lanes as an instruction takes. Taken: which of them, a bit each (portable: a lane each).
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SFT_SELECT_AVX512
constexpr int32_t kLanes = 16;
#elif defined(__AVX2__)
#define SFT_SELECT_AVX2
constexpr int32_t kLanes = 8;
#else
constexpr int32_t kLanes = 4;
#endif
typedef int32_t Lanes __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint16_t Offsets __attribute__((vector_size(kLanes * sizeof(uint16_t))));

inline Lanes load_lanes(const int32_t *from) {
  Lanes lanes;
  memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

// take(key, low): the lanes > low. put(taken, lanes, out): those lanes, in order, to out, where
// there must be room for all lanes.
#if defined(SFT_SELECT_AVX512)
using Taken = __mmask16;
inline Taken take(Lanes key, int32_t low) {
  return _mm512_cmpgt_epi32_mask((__m512i)key, _mm512_set1_epi32(low));
}
inline bool any(Taken taken) { return taken != 0; }
inline int32_t count(Taken taken) { return __builtin_popcount(taken); }
// Compressed in a register: the form that stores to memory is slow on some processors.
inline void put(Taken taken, Lanes key, int32_t *out) {
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(taken, (__m512i)key));
}
inline void put(Taken taken, Offsets offset, uint16_t *out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(out),
                      _mm256_maskz_compress_epi16(taken, (__m256i)offset));
}
#elif defined(SFT_SELECT_AVX2)
using Taken = int32_t;
inline Taken take(Lanes key, int32_t low) { return _mm256_movemask_ps((__m256)(key > low)); }
inline bool any(Taken taken) { return taken != 0; }
inline int32_t count(Taken taken) { return __builtin_popcount(static_cast<uint32_t>(taken)); }
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
constexpr LaneTable kLaneTable;
inline __m128i lanes_of(Taken taken) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i *>(kLaneTable.lane[taken]));
}
inline void put(Taken taken, Lanes key, int32_t *out) {
  const __m256i lanes = _mm256_cvtepu8_epi32(lanes_of(taken));
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(out),
                      _mm256_permutevar8x32_epi32((__m256i)key, lanes));
}
inline void put(Taken taken, Offsets offset, uint16_t *out) {
  const __m128i twice = _mm_add_epi8(lanes_of(taken), lanes_of(taken));
  const __m128i bytes = _mm_unpacklo_epi8(twice, _mm_add_epi8(twice, _mm_set1_epi8(1)));
  _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm_shuffle_epi8((__m128i)offset, bytes));
}
#else
using Taken = Lanes;
inline Taken take(Lanes key, int32_t low) { return key > low; }
inline bool any(Taken taken) {
  uint64_t half[2];
  memcpy(half, &taken, sizeof half);
  return (half[0] | half[1]) != 0;
}
inline int32_t count(Taken taken) {
  uint64_t half[2];
  memcpy(half, &taken, sizeof half);
  constexpr uint64_t kOnes = 0x100000001;
  const uint64_t sum = (half[0] & kOnes) + (half[1] & kOnes);
  return static_cast<int32_t>(sum + (sum >> 32));
}
template <class Vector, class Value>
inline void put(Taken taken, Vector from, Value *out) {
  if (count(taken) == kLanes) {  // a mass of ties
    memcpy(out, &from, sizeof from);
    return;
  }
  for (int32_t i = 0; i < kLanes; ++i) {
    *out = from[i];
    out -= taken[i];
  }
}
#endif

// The keys in (low, most], in order; returns how many. Up to kLanes more may be overwritten.
inline int32_t keys_between(const int32_t *key, int32_t n, int32_t low, int32_t most,
                            int32_t *__restrict out) {
  int32_t found = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Lanes keys = load_lanes(key + i);
    const Taken taken = take(keys, low) & ~take(keys, most);
    if (!any(taken)) continue;
    put(taken, keys, out + found);
    found += count(taken);
  }
  for (; i < n; ++i) {
    out[found] = key[i];
    found += (key[i] > low) & (key[i] <= most);
  }
  return found;
}

// The offsets of the keys above low, in order, which end before `end`; nothing is written there.
inline uint16_t *offsets_above(const int32_t *key, const uint16_t *offset, int32_t n, int32_t low,
                               uint16_t *__restrict out, const uint16_t *end) {
  int32_t i = 0;
  for (; i + kLanes <= n && end - out >= kLanes; i += kLanes) {
    const Taken taken = take(load_lanes(key + i), low);
    Offsets offsets;
    memcpy(&offsets, offset + i, sizeof offsets);
    put(taken, offsets, out);
    out += count(taken);
  }
  for (; i < n && out < end; ++i) {
    *out = offset[i];
    out += key[i] > low;
  }
  return out;
}

// Writes the keys >= low among n, a multiple of kLanes, and their offsets, of which `first` is the
// first; load(i) gives the keys at i. Returns how many. Up to kLanes more are overwritten, the keys
// with kNone.
template <class Load>
inline int32_t keys_from(const Load &load, int32_t n, int32_t first, int32_t low,
                         int32_t *__restrict out_key, uint16_t *__restrict out_offset) {
  Offsets offset;
  for (int32_t i = 0; i < kLanes; ++i) offset[i] = static_cast<uint16_t>(first + i);
  int32_t found = 0;
  for (int32_t i = 0; i < n; i += kLanes, offset += kLanes) {
    const Lanes key = load(i);
    const Taken taken = take(key, low - 1);
#if !defined(SFT_SELECT_AVX512)  // where it costs less to do it always
    if (!any(taken)) continue;
#endif
    put(taken, key, out_key + found);
    put(taken, offset, out_offset + found);
    found += count(taken);
  }
  const Lanes none = Lanes{} + kNone;
  memcpy(out_key + found, &none, sizeof none);
  return found;
}

// Keys > low are stored as candidates, but for those > most, which is high or kNoLimit.
struct Bounds {
  int32_t low, high, most;
};

struct Tally {
  int32_t at_low = 0, above = 0, unseen = 0;  // keys = low, > high, > most
  int32_t largest = kNone;
};

// Counts the keys, which are >= low and followed by kLanes that are kNone, and drops those that are
// not stored; returns how many are left.
inline int32_t sift(int32_t *key, uint16_t *offset, int32_t n, Bounds bounds, Tally *tally) {
  int32_t at_low = 0, above = 0, unseen = 0;
  Lanes largest = Lanes{} + tally->largest;
  for (int32_t i = 0; i < n; i += kLanes) {
    const Lanes keys = load_lanes(key + i);
    at_low += count(take(keys, bounds.low - 1) & ~take(keys, bounds.low));
    above += count(take(keys, bounds.high));
    unseen += count(take(keys, bounds.most));
    largest = keys > largest ? keys : largest;
  }
  tally->at_low += at_low;
  tally->above += above;
  tally->unseen += unseen;
  for (int32_t i = 0; i < kLanes; ++i) {
    tally->largest = tally->largest > largest[i] ? tally->largest : largest[i];
  }
  if (at_low == 0 && unseen == 0) return n;
  int32_t found = 0;
  for (int32_t i = 0; i < n; i += kLanes) {
    const Lanes keys = load_lanes(key + i);
    Offsets offsets;
    memcpy(&offsets, offset + i, sizeof offsets);
    const Taken taken = take(keys, bounds.low) & ~take(keys, bounds.most);
    if (!any(taken)) continue;
    put(taken, keys, key + found);
    put(taken, offsets, offset + found);
    found += count(taken);
  }
  return found;
}

// --- workspace ---

struct Tile {
  int64_t start;   // of its candidates: block * kBlockEntries + place; while sampling: first entry
  int32_t stored;  // candidates
  int32_t unseen;  // keys > H that are not stored
  int32_t at_low;  // keys = L
  int32_t ties;    // ties at T that it takes: kAllTies, or a number less than there are
};

constexpr int32_t kAllTies = -1;

struct Block {
  int32_t key[kBlockEntries];
  uint16_t offset[kBlockEntries];
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

// The key at a rank (1 is the largest) among the keys in [least, most] that visit(i, use), i < n,
// hands to use(keys, count) piece by piece; at least `rank` must be there. Up to three passes, of
// which the first spreads the keys over the bins as far as their range allows.
template <class Visit>
inline Rank key_at_rank(int64_t n, int32_t threads, int64_t work, uint64_t *bins, int64_t rank,
                        int32_t least, int32_t most, const Visit &visit) {
  constexpr int32_t kDigit = 11;
  const int32_t team = team_size(n, threads, work);
  int64_t greater = 0;
  while (least < most) {
    const int32_t bits = 32 - __builtin_clz(static_cast<uint32_t>(most - least));
    const int32_t shift = bits < kDigit ? 0 : bits - kDigit;
    memset(bins, 0, static_cast<size_t>(team) * kBins * sizeof(uint64_t));
    for_each(n, threads, work, [&](int64_t i, int32_t thread) {
      uint64_t *mine = bins + int64_t{thread} * kBins;
      visit(i, [&](const int32_t *key, int32_t count) {
        int32_t keys[kStrip + kLanes];
        for (int32_t start = 0; start < count; start += kStrip) {
          const int32_t some = count - start < kStrip ? count - start : kStrip;
          const int32_t found = keys_between(key + start, some, least - 1, most, keys);
          for (int32_t e = 0; e < found; ++e) ++mine[(keys[e] - least) >> shift];
        }
      });
    });
    for (int32_t thread = 1; thread < team; ++thread) {
      for (int32_t i = 0; i < kBins; ++i) bins[i] += bins[int64_t{thread} * kBins + i];
    }
    int32_t i = (most - least) >> shift;
    for (; i > 0 && greater + static_cast<int64_t>(bins[i]) < rank; --i) {
      greater += static_cast<int64_t>(bins[i]);
    }
    least += i << shift;
    const int32_t width = (1 << shift) - 1;
    if (most - least > width) most = least + width;
  }
  return {least, greater};
}

// --- the problem ---

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

  // Calls use(keys, count) for the strips of a tile.
  template <class Use>
  void strips(int64_t t, const Use &use) const {
    int32_t key[kStrip];
    int64_t excluded = first_exclusion(t);
    for (int32_t first = 0; first < length[t]; first += kStrip) {
      const int32_t count = length[t] - first < kStrip ? length[t] - first : kStrip;
      read(t, first, count, key, &excluded);
      use(key, count);
    }
  }

  // Calls use(keys, offsets, count) with the keys >= low of each strip of a tile that has any,
  // until it returns false. They may be changed; kLanes that are kNone follow them.
  template <class Use>
  void sweep_tile(int64_t t, int32_t low, const Use &use) const {
    int32_t keys[kStrip + kLanes];
    uint16_t offsets[kStrip + kLanes];
    int64_t excluded = first_exclusion(t);
    const int64_t last_excluded = exclude_idx ? exclude_ptr[t + 1] : 0;
    for (int32_t first = 0; first < length[t]; first += kStrip) {
      const int32_t count = length[t] - first < kStrip ? length[t] - first : kStrip;
      int32_t found = 0;
      const auto sweep = [&](const auto &load) {
        found = keys_from(load, (count + 15) & ~15, first, low, keys, offsets);
      };
      const bool plain = excluded == last_excluded || exclude_idx[excluded] >= first + count;
      if (Source::kLoads && plain && count % 16 == 0) {
        source.with_load(t, first, sweep);
      } else {
        int32_t key[kStrip];
        read(t, first, count, key, &excluded);
        sweep([&](int32_t i) { return load_lanes(key + i); });
      }
      if (found && !use(keys, offsets, found)) return;
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

  // Adds candidates of a tile; false where there is no room.
  bool store(Writer *writer, const int32_t *key, const uint16_t *offset, int32_t count,
             Tile *tile) const {
    for (int32_t done = 0; done < count;) {
      const bool any_room = writer->block != kNowhere && writer->place < kBlockEntries;
      if (writer->full || (!any_room && !take_block(writer))) return false;
      if (!tile->stored) tile->start = place(writer->block, writer->place);
      Block *block = &ws.blocks[writer->block];
      const int64_t room = kBlockEntries - writer->place;
      const int32_t some = count - done < room ? count - done : static_cast<int32_t>(room);
      memcpy(block->key + writer->place, key + done, static_cast<size_t>(some) * sizeof *key);
      memcpy(block->offset + writer->place, offset + done,
             static_cast<size_t>(some) * sizeof *offset);
      writer->place += some;
      ws.used[writer->block] = static_cast<int32_t>(writer->place);
      tile->stored += some;
      done += some;
    }
    return true;
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
    int64_t bad_tile = n, least_negated = -int64_t{kNone}, above = 0;
    for_each(n, threads, total, [&](int64_t t, int32_t thread) {
      Tile tile = {0, 0, 0, 0, 0};
      Tally tally;
      sweep_tile(t, bounds.low, [&](int32_t *key, uint16_t *offset, int32_t count) {
        count = sift(key, offset, count, bounds, &tally);
        store(&ws.writers[thread], key, offset, count, &tile);
        return true;
      });
      tile.at_low = tally.at_low;
      tile.unseen = tally.unseen;
      if (tally.above) add_atomically(&above, tally.above);
      const int32_t largest = tally.largest;
      ws.tiles[t] = tile;
      lower_atomically(&least_negated, -int64_t{largest});
      if (Source::kMayBeInfinite && largest >= kInfinity) lower_atomically(&bad_tile, t);
    });
    Swept swept = {0,
                   above,
                   0,
                   ws.header->blocks_used > ws.n_blocks,
                   static_cast<int32_t>(-least_negated),
                   bad_tile};
    for (int64_t t = 0; t < n; ++t) {
      swept.stored += ws.tiles[t].stored;
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
                       [&](int64_t t, const auto &use) { strips(t, use); });
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
    Bounds bounds = {-1, kNoLimit, kNoLimit};
    if (k == 0) {
      bounds.low = kInfinity;
    } else if (total > room) {
      bounds = source.bounds(*this, room);
    }
    // Whatever is not finite must be seen.
    if (Source::kMayBeInfinite && bounds.low > kInfinity) bounds.low = kInfinity;
    Swept swept = sweep(bounds);
    if (swept.bad_tile < n) {
      info[5] = swept.bad_tile;
      return SFT_NONFINITE;
    }
    if (k == 0) return SFT_OK;

    // The rank of T among the keys <= H, and how many of those are stored.
    const bool all_stored = bounds.most > bounds.high;
    const int64_t rank = k - swept.above;
    const int64_t stored = swept.stored - (all_stored ? swept.above : 0);
    int32_t threshold;
    if (swept.full || (rank < 1 && !all_stored) || rank > stored + swept.at_low) {
      info[6] = 1;
      const Rank exact = exact_at_rank(k);
      threshold = exact.key;
      const int32_t most = exact.greater <= room ? kNoLimit : threshold;
      bounds = {threshold, most, most};
      swept = sweep(bounds);
    } else if (rank < 1) {
      threshold = candidate_at_rank(k, swept.stored, bounds.high + 1, swept.largest).key;
    } else if (rank > stored) {
      threshold = bounds.low;
    } else {
      const int32_t most = swept.largest < bounds.high ? swept.largest : bounds.high;
      threshold = candidate_at_rank(rank, swept.stored, bounds.low + 1, most).key;
    }
    ws.header->threshold = threshold;

    // Per tile, entries > T (kept in ptr for the moment) and = T.
    for_each(n, threads, swept.stored, [&](int64_t t, int32_t) {
      Tile *tile = &ws.tiles[t];
      int64_t greater = tile->unseen;
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
      // All ties or none: the offsets of the keys above a bound.
      const bool simple = tile.ties == 0 || tile.ties == kAllTies;
      const int32_t low = tile.ties == 0 ? threshold : threshold - 1;
      int32_t ties_left = tile.ties;
      // Nothing is written at `end`, where the next tile begins.
      const auto pick = [&](const int32_t *key, const uint16_t *offset, int32_t count) {
        if (simple) {
          out = offsets_above(key, offset, count, low, out, end);
          return out < end;
        }
        for (int32_t i = 0; i < count && out < end; ++i) {
          const bool tied = (key[i] == threshold) & (ties_left > 0);
          *out = offset[i];
          ties_left -= tied;
          out += (key[i] > threshold) | tied;
        }
        return out < end;
      };
      if (tile.unseen == 0 && (threshold > ws.header->low || tile.ties == 0)) {
        candidates(t, pick);
        return;
      }
      sweep_tile(t, low + 1, pick);
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
