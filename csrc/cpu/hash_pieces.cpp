// hash_pieces: BLAKE2b-256 (RFC 7693) of each piece of SFT_HASH_PIECE bytes.
//
// One BLAKE2b is a chain of dependent steps, so several pieces are hashed at once, each in its own
// lane of vectors: as many lanes as registers can hold. The vectors are the compiler's own, so that
// one source serves every instruction set.
//
// Moves: the bytes, once.
#include "common.h"

namespace sft::SFT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif

typedef uint64_t Vec __attribute__((vector_size(8 * kLanes)));

constexpr int64_t kBlockBytes = 128, kHashBytes = 32;
constexpr int kRounds = 12, kWords = 16;

// RFC 7693, section 2.6: the initial state.
constexpr uint64_t kIv[8] = {0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B,
                             0xA54FF53A5F1D36F1, 0x510E527FADE682D1, 0x9B05688C2B3E6C1F,
                             0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179};

// RFC 7693, section 2.7: which words of the message a round takes. Rounds 10 and 11 repeat 0 and 1.
constexpr uint8_t kSigma[10][kWords] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                        {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
                                        {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
                                        {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
                                        {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
                                        {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
                                        {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
                                        {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
                                        {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
                                        {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

template <int kBits>
inline Vec rotate_right(Vec x) {
  return (x >> kBits) | (x << (64 - kBits));
}

// RFC 7693, section 3.1: mixing.
inline void mix(Vec &a, Vec &b, Vec &c, Vec &d, Vec x, Vec y) {
  a = a + b + x;
  d = rotate_right<32>(d ^ a);
  c = c + d;
  b = rotate_right<24>(b ^ c);
  a = a + b + y;
  d = rotate_right<16>(d ^ a);
  c = c + d;
  b = rotate_right<63>(b ^ c);
}

// RFC 7693, section 3.2: takes a block of every lane into the state h. `done` bytes of each piece,
// this block's included, have been taken; `last` says that no more follow.
inline void compress(Vec *h, const uint8_t *const *blocks, int64_t done, bool last) {
  Vec m[kWords], v[16];
  for (int i = 0; i < kWords; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) {
      uint64_t word;
      memcpy(&word, blocks[lane] + 8 * i, 8);
      m[i][lane] = word;
    }
  }
  for (int i = 0; i < 8; ++i) {
    v[i] = h[i];
    v[i + 8] = Vec{} + kIv[i];
  }
  v[12] ^= static_cast<uint64_t>(done);
  if (last) v[14] = ~v[14];
  for (int round = 0; round < kRounds; ++round) {
    const uint8_t *s = kSigma[round % 10];
    mix(v[0], v[4], v[8], v[12], m[s[0]], m[s[1]]);
    mix(v[1], v[5], v[9], v[13], m[s[2]], m[s[3]]);
    mix(v[2], v[6], v[10], v[14], m[s[4]], m[s[5]]);
    mix(v[3], v[7], v[11], v[15], m[s[6]], m[s[7]]);
    mix(v[0], v[5], v[10], v[15], m[s[8]], m[s[9]]);
    mix(v[1], v[6], v[11], v[12], m[s[10]], m[s[11]]);
    mix(v[2], v[7], v[8], v[13], m[s[12]], m[s[13]]);
    mix(v[3], v[4], v[9], v[14], m[s[14]], m[s[15]]);
  }
  for (int i = 0; i < 8; ++i) h[i] ^= v[i] ^ v[i + 8];
}

// The hashes of n <= kLanes neighbouring pieces of `length` bytes each.
void hash_group(const uint8_t *data, int n, int64_t length, uint8_t *out) {
  // Lanes to spare hash the first piece again.
  const uint8_t *at[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) at[lane] = data + (lane < n ? lane : 0) * length;
  Vec h[8];
  for (int i = 0; i < 8; ++i) h[i] = Vec{} + kIv[i];
  // The parameters: a sequential hash of 32 bytes, without a key.
  h[0] ^= uint64_t{0x01010000} ^ kHashBytes;
  int64_t done = 0;
  for (; length - done > kBlockBytes; done += kBlockBytes) {
    const uint8_t *blocks[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) blocks[lane] = at[lane] + done;
    compress(h, blocks, done + kBlockBytes, false);
  }
  uint8_t rest[kLanes][kBlockBytes] = {};
  const uint8_t *blocks[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    memcpy(rest[lane], at[lane] + done, static_cast<size_t>(length - done));
    blocks[lane] = rest[lane];
  }
  compress(h, blocks, length, true);
  for (int lane = 0; lane < n; ++lane) {
    for (int64_t i = 0; i < kHashBytes / 8; ++i) {
      const uint64_t word = h[i][lane];
      memcpy(out + lane * kHashBytes + 8 * i, &word, 8);
    }
  }
}

}  // namespace

int32_t hash_pieces(const uint8_t *data, int64_t n, uint8_t *out, int32_t threads) {
  if (n < 0 || (n > 0 && (!data || !out))) return SFT_BAD_ARGUMENT;
  const int64_t whole = n / SFT_HASH_PIECE, rest = n % SFT_HASH_PIECE;
  const int64_t groups = (whole + kLanes - 1) / kLanes;
  for_each(groups, threads, n, [&](int64_t group, int32_t) {
    const int64_t first = group * kLanes;
    const int64_t count = whole - first < kLanes ? whole - first : kLanes;
    hash_group(data + first * SFT_HASH_PIECE, static_cast<int>(count), SFT_HASH_PIECE,
               out + first * kHashBytes);
  });
  if (rest > 0) hash_group(data + whole * SFT_HASH_PIECE, 1, rest, out + whole * kHashBytes);
  return SFT_OK;
}

}  // namespace sft::SFT_ISA
