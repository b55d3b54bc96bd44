// The exported functions: each forwards to the best instruction set that the machine has.
//
// Every other file of this folder is compiled once per instruction set, with SFT_ISA naming it. So
// that the linker can never put an AVX-512 copy of a function into the portable path, those files
// define nothing outside sft::SFT_ISA and use no template or inline function of the C++ library.
#include "sparse_ft.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <string.h>

#define SFT_ISA portable
#include "ops.inl"
#undef SFT_ISA
#if defined(SFT_HAS_AVX2)
#define SFT_ISA avx2
#include "ops.inl"
#undef SFT_ISA
#endif
#if defined(SFT_HAS_AVX512)
#define SFT_ISA avx512
#include "ops.inl"
#undef SFT_ISA
#endif

#ifndef SFT_BUILD_ID
#define SFT_BUILD_ID "unknown"
#endif

namespace {

struct Table {
  const char *name;
#define SFT_MEMBER(op) decltype(&::sft_cpu_##op) op;
  SFT_OPS(SFT_MEMBER)
#undef SFT_MEMBER
};

#define SFT_ENTRY(op) sft::SFT_ISA::op,
#define SFT_ISA portable
const Table kPortable = {"portable", SFT_OPS(SFT_ENTRY)};
#undef SFT_ISA
#if defined(SFT_HAS_AVX2)
#define SFT_ISA avx2
const Table kAvx2 = {"avx2", SFT_OPS(SFT_ENTRY)};
#undef SFT_ISA
#endif
#if defined(SFT_HAS_AVX512)
#define SFT_ISA avx512
const Table kAvx512 = {"avx512", SFT_OPS(SFT_ENTRY)};
#undef SFT_ISA
#endif
#undef SFT_ENTRY

#if defined(SFT_HAS_AVX2) || defined(SFT_HAS_AVX512)
// __builtin_cpu_supports also asks whether the operating system saves the registers. F16C and LZCNT
// are read from CPUID, because older compilers do not know them there.
bool has_avx2() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  __builtin_cpu_init();
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
  const bool lzcnt = __get_cpuid(0x80000001, &a, &b, &c, &d) && (c & (1u << 5));
  return f16c && lzcnt && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}
#endif

#if defined(SFT_HAS_AVX512)
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi2");
}
#endif

// The table of an instruction set, or of the best one where `isa` is null; null where the machine
// or the build lacks it.
const Table *find_table(const char *isa) {
#if defined(SFT_HAS_AVX512)
  if ((!isa || !strcmp(isa, kAvx512.name)) && has_avx512()) return &kAvx512;
#endif
#if defined(SFT_HAS_AVX2)
  if ((!isa || !strcmp(isa, kAvx2.name)) && has_avx2()) return &kAvx2;
#endif
  return !isa || !strcmp(isa, kPortable.name) ? &kPortable : nullptr;
}

const Table *current_table = nullptr;

const Table *table() {
  const Table *found = __atomic_load_n(&current_table, __ATOMIC_ACQUIRE);
  if (!found) {
    found = find_table(nullptr);
    __atomic_store_n(&current_table, found, __ATOMIC_RELEASE);
  }
  return found;
}

}  // namespace

extern "C" {

int32_t sft_abi_version(void) { return SFT_ABI_VERSION; }

const char *sft_build_id(void) { return SFT_BUILD_ID; }

const char *sft_status_string(int32_t status) {
  switch (status) {
    case SFT_OK:
      return "success";
    case SFT_BAD_ARGUMENT:
      return "a null pointer, a negative length or an unknown code among the arguments";
    case SFT_NONFINITE:
      return "NaN or infinity among the scores";
    case SFT_TOO_FEW:
      return "more entries wanted than are eligible";
    case SFT_WORKSPACE:
      return "a workspace that is too small";
    default:
      return "an unknown status";
  }
}

const char *sft_cpu_isa(void) { return table()->name; }

int32_t sft_cpu_set_isa(const char *isa) {
  const Table *found = isa ? find_table(isa) : nullptr;
  if (!found) return SFT_BAD_ARGUMENT;
  __atomic_store_n(&current_table, found, __ATOMIC_RELEASE);
  return SFT_OK;
}

int64_t sft_cpu_select_topk_workspace_bytes(int64_t n_tiles, int64_t k, int64_t n_excluded,
                                            int32_t threads) {
  return table()->select_topk_workspace_bytes(n_tiles, k, n_excluded, threads);
}

int32_t sft_cpu_select_topk_find(const sft_tiles *a, const sft_tiles *b, int64_t k,
                                 const uint16_t *exclude_idx, const int64_t *exclude_ptr,
                                 int32_t tie, int64_t *ptr, int64_t *info, void *workspace,
                                 int64_t workspace_bytes, int32_t threads) {
  return table()->select_topk_find(a, b, k, exclude_idx, exclude_ptr, tie, ptr, info, workspace,
                                   workspace_bytes, threads);
}

int32_t sft_cpu_select_topk_emit(const sft_tiles *a, const sft_tiles *b, int64_t k,
                                 const uint16_t *exclude_idx, const int64_t *exclude_ptr,
                                 int32_t tie, const int64_t *ptr, const int64_t *info,
                                 void *workspace, int64_t workspace_bytes, uint16_t *idx,
                                 int32_t threads) {
  return table()->select_topk_emit(a, b, k, exclude_idx, exclude_ptr, tie, ptr, info, workspace,
                                   workspace_bytes, idx, threads);
}

int32_t sft_cpu_select_random_find(const int32_t *length, int64_t n_tiles, int64_t k, uint64_t seed,
                                   const uint16_t *exclude_idx, const int64_t *exclude_ptr,
                                   int64_t *ptr, int64_t *info, void *workspace,
                                   int64_t workspace_bytes, int32_t threads) {
  return table()->select_random_find(length, n_tiles, k, seed, exclude_idx, exclude_ptr, ptr, info,
                                     workspace, workspace_bytes, threads);
}

int32_t sft_cpu_select_random_emit(const int32_t *length, int64_t n_tiles, int64_t k, uint64_t seed,
                                   const uint16_t *exclude_idx, const int64_t *exclude_ptr,
                                   const int64_t *ptr, const int64_t *info, void *workspace,
                                   int64_t workspace_bytes, uint16_t *idx, int32_t threads) {
  return table()->select_random_emit(length, n_tiles, k, seed, exclude_idx, exclude_ptr, ptr, info,
                                     workspace, workspace_bytes, idx, threads);
}

int32_t sft_cpu_gather(const sft_tiles *grads, int64_t n_tiles, const uint16_t *idx,
                       const int64_t *ptr, float *out, const float *grad_scale, int32_t accumulate,
                       const float *delta, float l1, double *partials, double *norm_sq,
                       float *found_inf, int32_t threads) {
  return table()->gather(grads, n_tiles, idx, ptr, out, grad_scale, accumulate, delta, l1, partials,
                         norm_sq, found_inf, threads);
}

int32_t sft_cpu_masked_adamw(const sft_tiles *w, const uint16_t *idx, const int64_t *ptr,
                             const float *grad, const sft_tiles *grads, float *exp_avg,
                             float *exp_avg_sq, float *delta, const void *theta0, float *step,
                             const double *lr, double beta1, double beta2, double eps,
                             double weight_decay, float l1, const float *grad_scale,
                             const float *found_inf, const float *clip, int32_t threads) {
  return table()->masked_adamw(w, idx, ptr, grad, grads, exp_avg, exp_avg_sq, delta, theta0, step,
                               lr, beta1, beta2, eps, weight_decay, l1, grad_scale, found_inf, clip,
                               threads);
}

int32_t sft_cpu_dense_adamw(const sft_tiles *w, const sft_tiles *grads, const sft_tiles *exp_avg,
                            const sft_tiles *exp_avg_sq, const sft_tiles *master,
                            int32_t master_kind, const sft_tiles *anchors, float *step,
                            const double *lr, double beta1, double beta2, double eps,
                            double weight_decay, float l1, const float *grad_scale,
                            const float *found_inf, const float *clip, int32_t threads) {
  return table()->dense_adamw(w, grads, exp_avg, exp_avg_sq, master, master_kind, anchors, step, lr,
                              beta1, beta2, eps, weight_decay, l1, grad_scale, found_inf, clip,
                              threads);
}

int64_t sft_cpu_compose_workspace_bytes(int32_t n_deltas, int32_t threads) {
  return table()->compose_workspace_bytes(n_deltas, threads);
}

int32_t sft_cpu_compose(const sft_tiles *w, int32_t n_deltas, const uint16_t *const *idx,
                        const int64_t *const *ptr, const void *const *val, const int32_t *val_dtype,
                        const float *alpha, void *const *undo, int64_t *stats, void *workspace,
                        int64_t workspace_bytes, int32_t threads) {
  return table()->compose(w, n_deltas, idx, ptr, val, val_dtype, alpha, undo, stats, workspace,
                          workspace_bytes, threads);
}

int32_t sft_cpu_restore(const sft_tiles *w, int32_t n_deltas, const uint16_t *const *idx,
                        const int64_t *const *ptr, const void *const *undo, int32_t threads) {
  return table()->restore(w, n_deltas, idx, ptr, undo, threads);
}

int64_t sft_cpu_merge_workspace_bytes(int32_t n_deltas, int32_t threads) {
  return table()->merge_workspace_bytes(n_deltas, threads);
}

int32_t sft_cpu_merge_count(int64_t n_tiles, int32_t n_deltas, const uint16_t *const *idx,
                            const int64_t *const *ptr, int64_t *out_ptr, void *workspace,
                            int64_t workspace_bytes, int32_t threads) {
  return table()->merge_count(n_tiles, n_deltas, idx, ptr, out_ptr, workspace, workspace_bytes,
                              threads);
}

int32_t sft_cpu_merge_fill(int64_t n_tiles, int32_t n_deltas, const uint16_t *const *idx,
                           const int64_t *const *ptr, const void *const *val,
                           const int32_t *val_dtype, const float *alpha, const int64_t *out_ptr,
                           uint16_t *out_idx, float *out_val, void *workspace,
                           int64_t workspace_bytes, int32_t threads) {
  return table()->merge_fill(n_tiles, n_deltas, idx, ptr, val, val_dtype, alpha, out_ptr, out_idx,
                             out_val, workspace, workspace_bytes, threads);
}

int32_t sft_cpu_reduce(int64_t n_tiles, int32_t n_deltas, const uint16_t *const *idx,
                       const int64_t *const *ptr, const void *const *val, const int32_t *val_dtype,
                       const float *alpha, const int64_t *out_ptr, uint16_t *out_idx, float *total,
                       float *positive, float *negative, float *largest, int16_t *n_present,
                       int16_t *n_positive, int16_t *n_negative, int32_t threads) {
  return table()->reduce(n_tiles, n_deltas, idx, ptr, val, val_dtype, alpha, out_ptr, out_idx,
                         total, positive, negative, largest, n_present, n_positive, n_negative,
                         threads);
}

int32_t sft_cpu_overlap(int64_t n_tiles, const uint16_t *idx_a, const int64_t *ptr_a,
                        const void *val_a, int32_t dtype_a, const uint16_t *idx_b,
                        const int64_t *ptr_b, const void *val_b, int32_t dtype_b, int64_t *counts,
                        double *dots, int32_t threads) {
  return table()->overlap(n_tiles, idx_a, ptr_a, val_a, dtype_a, idx_b, ptr_b, val_b, dtype_b,
                          counts, dots, threads);
}

int32_t sft_cpu_anchor_l1(const sft_tiles *grads, const sft_tiles *w, const sft_tiles *anchors,
                          float coeff, double *partials, double *total, int32_t threads) {
  return table()->anchor_l1(grads, w, anchors, coeff, partials, total, threads);
}

int32_t sft_cpu_digest(const sft_tiles *w, const uint16_t *idx, const int64_t *ptr, uint64_t *out,
                       int32_t threads) {
  return table()->digest(w, idx, ptr, out, threads);
}

int32_t sft_cpu_check_support(const int32_t *length, int64_t n_tiles, const uint16_t *idx,
                              const int64_t *ptr, int64_t nnz, const void *val, int32_t val_dtype,
                              int64_t *info, int32_t threads) {
  return table()->check_support(length, n_tiles, idx, ptr, nnz, val, val_dtype, info, threads);
}

int32_t sft_cpu_hash_pieces(const uint8_t *data, int64_t n, uint8_t *out, int32_t threads) {
  return table()->hash_pieces(data, n, out, threads);
}

}  // extern "C"
