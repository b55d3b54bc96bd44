/* The C ABI of sparse_ft: every function that a library built from csrc/ exports.
 *
 * Conventions
 *   - No torch headers, no allocation, no exceptions, no global state that changes a result. The caller owns all memory;
 *     scratch comes from a `*_workspace_bytes` query.
 *   - Functions return an sft_status. Lengths are int64, data types are sft_dtype codes.
 *   - CPU functions are called sft_cpu_*; their last argument is the number of threads, and the result has the same bits
 *     for every number of threads and every instruction set.
 *   - A model is a list of tiles: each tensor, in canonical order, cut flat and row-major into pieces of SFT_TILE elements
 *     that never span two tensors. A set of selected entries is `idx` (offset inside its tile, strictly ascending there)
 *     and `ptr` (first entry of each tile, n_tiles + 1 values).
 *   - Arithmetic is IEEE binary32, round to nearest even, never contracted into FMA; a store to a 16-bit type rounds once.
 *   - Sums are in binary64, in an order that can be parallel. The sum of a run of up to SFT_SUM_RUN values: pad it with +0 to
 *     SFT_SUM_RUN, then for h = 512, 256, …, 1: x[j] = x[j] + x[j + h] for j < h; the sum is x[0]. tree_sum(x) of n values:
 *     cut x into runs; their sums, in order, are again cut into runs, until one value is left (n = 0: +0; n = 1: x[0]).
 */
#ifndef SPARSE_FT_H
#define SPARSE_FT_H

#include <stdint.h>

#if defined(_WIN32)
#define SFT_API __declspec(dllexport)
#else
#define SFT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define SFT_ABI_VERSION 1
#define SFT_TILE 65536
#define SFT_SUM_RUN 1024
#define SFT_HASH_PIECE 65536

typedef enum { SFT_F32 = 0, SFT_BF16 = 1, SFT_F16 = 2 } sft_dtype;

typedef enum {
  SFT_OK = 0,
  SFT_BAD_ARGUMENT = 1, /* a null pointer, a negative length, an unknown code */
  SFT_NONFINITE = 2,    /* NaN or infinity among the scores; info names the tile */
  SFT_TOO_FEW = 3,      /* k exceeds the number of eligible entries */
  SFT_WORKSPACE = 4     /* the workspace is smaller than the query says */
} sft_status;

/* Among equal scores: the lower (tile, offset) first, or every entry that reaches the threshold. */
typedef enum { SFT_TIE_INDEX = 0, SFT_TIE_ALL = 1 } sft_tie;

/* Where dense_adamw keeps the binary32 values of its weights: in the weights alone (rounded to their type), in a tensor of
 * its own, or in the bfloat16 weight and 16 bits more.
 */
typedef enum { SFT_MASTER_NONE = 0, SFT_MASTER_F32 = 1, SFT_MASTER_SPLIT = 2 } sft_master;

/* Where the tiles of a list of tensors lie. */
typedef struct {
  const int64_t *base;   /* [n] address of the first element; 0: absent (a missing gradient) */
  const int32_t *length; /* [n] elements, 1 … SFT_TILE */
  const int32_t *dtype;  /* [n] sft_dtype */
  int64_t n;             /* tiles */
} sft_tiles;

SFT_API int32_t sft_abi_version(void);
SFT_API const char *sft_build_id(void);
SFT_API const char *sft_status_string(int32_t status);

/* The instruction set in use ("avx512", "avx2" or "portable"), and a way to force a lesser one (for tests). */
SFT_API const char *sft_cpu_isa(void);
SFT_API int32_t sft_cpu_set_isa(const char *isa);

/* select_topk: the k largest |fp32(a) - fp32(b)|, or |a| where b is null.
 * Key of an entry: the 31 magnitude bits of that binary32 difference. Larger key first, then lower (tile, offset).
 * exclude_idx, exclude_ptr (may be null): entries that cannot be chosen; they are not examined for NaN either.
 * find: fills ptr [n + 1] and info [8]; emit, called next with the same arguments and workspace, fills idx [info[1]].
 *   info[0] bits of the threshold T (the smallest chosen key)   info[1] nnz
 *   info[2] eligible entries with key > T    info[3] eligible entries with key = T    info[4] of those, chosen
 *   info[5] first tile that holds a NaN or infinity, else -1    info[6] 0: sampled bound held, 1: exact fallback ran
 *   info[7] eligible entries
 */
SFT_API int64_t sft_cpu_select_topk_workspace_bytes(int64_t n_tiles, int64_t k, int64_t n_excluded,
                                                    int32_t threads);
SFT_API int32_t sft_cpu_select_topk_find(const sft_tiles *a, const sft_tiles *b, int64_t k,
                                         const uint16_t *exclude_idx, const int64_t *exclude_ptr,
                                         int32_t tie, int64_t *ptr, int64_t *info, void *workspace,
                                         int64_t workspace_bytes, int32_t threads);
SFT_API int32_t sft_cpu_select_topk_emit(const sft_tiles *a, const sft_tiles *b, int64_t k,
                                         const uint16_t *exclude_idx, const int64_t *exclude_ptr,
                                         int32_t tie, const int64_t *ptr, const int64_t *info,
                                         void *workspace, int64_t workspace_bytes, uint16_t *idx,
                                         int32_t threads);

/* select_random: k entries, every set of k equally likely: the top k by a 31-bit hash of (seed, tile, offset).
 * key(t, i) = mix(seed * 0xD1342543DE82EF95 + (t * 65536 + i + 1) * 0x9E3779B97F4A7C15) >> 33, in uint64 arithmetic, with
 * mix(z): z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9; z = (z ^ z >> 27) * 0x94D049BB133111EB; return z ^ z >> 31.
 * Same two steps, info and workspace as select_topk (no test for NaN); only length [n_tiles] of the tiles is needed.
 */
SFT_API int32_t sft_cpu_select_random_find(const int32_t *length, int64_t n_tiles, int64_t k,
                                           uint64_t seed, const uint16_t *exclude_idx,
                                           const int64_t *exclude_ptr, int64_t *ptr, int64_t *info,
                                           void *workspace, int64_t workspace_bytes,
                                           int32_t threads);
SFT_API int32_t sft_cpu_select_random_emit(const int32_t *length, int64_t n_tiles, int64_t k,
                                           uint64_t seed, const uint16_t *exclude_idx,
                                           const int64_t *exclude_ptr, const int64_t *ptr,
                                           const int64_t *info, void *workspace,
                                           int64_t workspace_bytes, uint16_t *idx, int32_t threads);

/* gather: out = fp32(g[idx]), or out + fp32(g[idx]) where accumulate is not 0; then, where given, out = out / grad_scale
 * and out = out + l1 * sign(delta). A tile whose base is 0 has gradient 0. grads null: nothing is read; out is first set
 * to 0 unless accumulate.
 * norm_sq = tree_sum of the squares of out [nnz] (exact in binary64), whatever the tiles. found_inf = 1 where any out is not
 * finite, else 0: so where norm_sq is not, since squares of finite binary32 cannot overflow it.
 * partials: scratch, [ceil(nnz / SFT_SUM_RUN)].
 */
SFT_API int32_t sft_cpu_gather(const sft_tiles *grads, int64_t n_tiles, const uint16_t *idx,
                               const int64_t *ptr, float *out, const float *grad_scale,
                               int32_t accumulate, const float *delta, float l1, double *partials,
                               double *norm_sq, float *found_inf, int32_t threads);

/* masked_adamw: one AdamW step of the selected entries. All in binary32 but the scalars, which are formed in binary64 and
 * then rounded: t = (int64)(step + 1), c1 = 1 - beta1^t, c2 = sqrt(1 - beta2^t), a = lr / c1, d = lr * weight_decay.
 * beta^t has one value on every machine, by binary powering: p = 1, b = beta; while t > 0: if t is odd, p = p * b;
 * b = b * b, t = t >> 1; beta^t = p.
 *   g = grad / grad_scale;  g = g + l1 * sign(delta);  g = g * clip          (each only where given, or l1 != 0)
 *   m = m + (1 - beta1) * (g - m);   v = beta2 * v + ((1 - beta2) * g) * g
 *   delta = delta - d * (theta0 + delta)                                       (only where weight_decay != 0)
 *   delta = delta + (-a * m) / (sqrt(v) / c2 + eps);   w = round(theta0 + delta);   step = t
 * The gradient is `grad` [nnz], or, where that is null, read from the dense tiles `grads` (base 0: gradient 0).
 * found_inf (may be null) != 0: nothing at all is written. lr is binary64, step, grad_scale, found_inf, clip binary32 scalars.
 * theta0 [nnz] has the dtype of the weights, which must be one for all tiles. Entries outside idx are never written.
 */
SFT_API int32_t sft_cpu_masked_adamw(const sft_tiles *w, const uint16_t *idx, const int64_t *ptr,
                                     const float *grad, const sft_tiles *grads, float *exp_avg,
                                     float *exp_avg_sq, float *delta, const void *theta0,
                                     float *step, const double *lr, double beta1, double beta2,
                                     double eps, double weight_decay, float l1,
                                     const float *grad_scale, const float *found_inf,
                                     const float *clip, int32_t threads);

/* dense_adamw: one AdamW step of every entry of the tensors that have a gradient. Scalars and powers as in masked_adamw, and
 * e = 1 - lr * weight_decay, formed in binary64 and then rounded.
 *   x = master, or fp32(w);  g = fp32(grad) / grad_scale;  g = g + l1 * sign(x - fp32(anchor));  g = g * clip
 *                                                                              (each only where given, or l1 != 0)
 *   m = m + (1 - beta1) * (g - m);   v = beta2 * v + ((1 - beta2) * g) * g
 *   x = x * e                                                                  (only where weight_decay != 0)
 *   x = x + (-a * m) / (sqrt(v) / c2 + eps);   w = round(x);   step = t
 * Tiles of grads with base 0: nothing of theirs is read or written (a missing gradient, as torch.optim.AdamW has it); step
 * counts all the same. exp_avg and exp_avg_sq are both binary32 or both bfloat16; those are rounded at the store, after their
 * use. The weights have one dtype. anchors (may be null where l1 = 0): any dtypes.
 * master_kind SFT_MASTER_F32: master holds x, exactly. SFT_MASTER_SPLIT: the weights are bfloat16 and master has 16 signed
 * bits `low` per entry (the dtype code of its tiles is not read); in int32 arithmetic that wraps around
 *   bits of x = (bits of w << 16) + low;   w = (bits of x + 0x8000) >> 16;   low = bits of x - (w << 16)
 * so w is x rounded to the nearest bfloat16, ties away from zero, and nothing of x is lost.
 * found_inf (may be null) != 0: nothing at all is written.
 */
SFT_API int32_t sft_cpu_dense_adamw(const sft_tiles *w, const sft_tiles *grads,
                                    const sft_tiles *exp_avg, const sft_tiles *exp_avg_sq,
                                    const sft_tiles *master, int32_t master_kind,
                                    const sft_tiles *anchors, float *step, const double *lr,
                                    double beta1, double beta2, double eps, double weight_decay,
                                    float l1, const float *grad_scale, const float *found_inf,
                                    const float *clip, int32_t threads);

/* compose: w = round(fp32(w) + acc) with acc = fl(acc + fl(alpha_j * fp32(val_j))) from +0 over the deltas j in the order
 * given; where acc = 0 the weight keeps its bits. undo (may be null): undo[j] [nnz_j], in the dtype of the weights, first
 * receives the untouched weights at delta j's entries. All deltas have their ptr over the tiles of w.
 * stats[0] distinct entries with acc != 0;  stats[1] of those, entries whose weight did not change ("swallowed").
 */
SFT_API int64_t sft_cpu_compose_workspace_bytes(int32_t n_deltas, int32_t threads);
SFT_API int32_t sft_cpu_compose(const sft_tiles *w, int32_t n_deltas, const uint16_t *const *idx,
                                const int64_t *const *ptr, const void *const *val,
                                const int32_t *val_dtype, const float *alpha, void *const *undo,
                                int64_t *stats, void *workspace, int64_t workspace_bytes,
                                int32_t threads);

/* restore: w[idx_j] = undo[j], bit for bit. Where supports overlap, their undo logs must hold the same value there, as
 * compose writes them; the deltas may then be restored in any order, or at once.
 */
SFT_API int32_t sft_cpu_restore(const sft_tiles *w, int32_t n_deltas, const uint16_t *const *idx,
                                const int64_t *const *ptr, const void *const *undo,
                                int32_t threads);

/* merge: the union of the supports, with values acc as in compose (an acc of 0 stays, as an explicit 0).
 * count fills out_ptr [n_tiles + 1]; fill writes out_idx and out_val [out_ptr[n_tiles]].
 */
SFT_API int64_t sft_cpu_merge_workspace_bytes(int32_t n_deltas, int32_t threads);
SFT_API int32_t sft_cpu_merge_count(int64_t n_tiles, int32_t n_deltas, const uint16_t *const *idx,
                                    const int64_t *const *ptr, int64_t *out_ptr, void *workspace,
                                    int64_t workspace_bytes, int32_t threads);
SFT_API int32_t sft_cpu_merge_fill(int64_t n_tiles, int32_t n_deltas, const uint16_t *const *idx,
                                   const int64_t *const *ptr, const void *const *val,
                                   const int32_t *val_dtype, const float *alpha,
                                   const int64_t *out_ptr, uint16_t *out_idx, float *out_val,
                                   void *workspace, int64_t workspace_bytes, int32_t threads);

/* reduce: what the deltas say of each entry of their union, which merge_count has counted into out_ptr. With
 * x_j = fl(alpha_j * fp32(val_j)) of the deltas j that have the entry, in the order given, all sums in binary32 from +0:
 *   total = sum of x_j;   positive = sum of the x_j > 0;   negative = sum of the x_j < 0
 *   largest = the x_j of largest magnitude, of x and -x the positive one (+0 where all are 0 or NaN)
 *   n_present, n_positive, n_negative = how many have it, with x_j > 0, with x_j < 0; so n_deltas is at most 32767.
 * out_idx and each of the seven: [out_ptr[n_tiles]].
 */
SFT_API int32_t sft_cpu_reduce(int64_t n_tiles, int32_t n_deltas, const uint16_t *const *idx,
                               const int64_t *const *ptr, const void *const *val,
                               const int32_t *val_dtype, const float *alpha, const int64_t *out_ptr,
                               uint16_t *out_idx, float *total, float *positive, float *negative,
                               float *largest, int16_t *n_present, int16_t *n_positive,
                               int16_t *n_negative, int32_t threads);

/* overlap: per tile, counts [n_tiles, 2] = entries in both, of those with the same sign (both > 0 or both < 0);
 * dots [n_tiles, 3] = sum of a*b, a*a, b*b over the entries in both: the entries of a in the tile are cut into runs; in each,
 * the products (+0 where b lacks the entry) are summed as a run; the sums of the runs are added in order from +0.
 */
SFT_API int32_t sft_cpu_overlap(int64_t n_tiles, const uint16_t *idx_a, const int64_t *ptr_a,
                                const void *val_a, int32_t dtype_a, const uint16_t *idx_b,
                                const int64_t *ptr_b, const void *val_b, int32_t dtype_b,
                                int64_t *counts, double *dots, int32_t threads);

/* anchor_l1: g = round(fp32(g) + coeff * sign(w - anchor)) where g's base is not 0 (w - anchor in binary32, sign(0) = 0);
 * total = tree_sum of the sums of the tiles; that of a tile: |w - anchor| cut into runs, whose sums are added in order from
 * +0. partials: scratch, [n_tiles]. grads may be null.
 */
SFT_API int32_t sft_cpu_anchor_l1(const sft_tiles *grads, const sft_tiles *w,
                                  const sft_tiles *anchors, float coeff, double *partials,
                                  double *total, int32_t threads);

/* digest: out[0] = sum of mix((t * 65536 + i + 1) * 0x9E3779B97F4A7C15 + bits * 0xD1342543DE82EF95) mod 2^64 over the
 * entries (tile t, offset i), bits = the binary32 bits of the weight (mix as in select_random); out[1]: the same with the
 * 16 bits of the weight rounded to bfloat16.
 */
SFT_API int32_t sft_cpu_digest(const sft_tiles *w, const uint16_t *idx, const int64_t *ptr,
                               uint64_t *out, int32_t threads);

/* check_support: are idx and ptr well formed, and the values (may be null) finite? ptr is read only while it is valid.
 * info[0]: 0 well formed, 1 ptr[0] is not 0 or ptr[n_tiles] is not nnz, 2 ptr decreases or a step exceeds its tile's length,
 * 3 idx not strictly ascending in its tile, 4 idx beyond its tile's length, 5 a value is NaN or infinite.
 * info[1]: the first tile with the fault (lowest), info[2]: its first entry, info[3]: values that are exactly 0 (0 where
 * there is a fault).
 */
SFT_API int32_t sft_cpu_check_support(const int32_t *length, int64_t n_tiles, const uint16_t *idx,
                                      const int64_t *ptr, int64_t nnz, const void *val,
                                      int32_t val_dtype, int64_t *info, int32_t threads);

/* hash_pieces: out [ceil(n / SFT_HASH_PIECE), 32] = BLAKE2b-256 (RFC 7693: no key, sequential) of each piece of SFT_HASH_PIECE
 * bytes of data [n]; the last piece may be shorter. n = 0: no piece.
 */
SFT_API int32_t sft_cpu_hash_pieces(const uint8_t *data, int64_t n, uint8_t *out, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
