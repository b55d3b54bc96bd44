// Declares every operation in namespace sft::SFT_ISA, with the type of its exported function.
// No guard: dispatch.cpp includes it once for each instruction set.
#ifndef SFT_OPS
#define SFT_OPS(X)               \
  X(select_topk_workspace_bytes) \
  X(select_topk_find)            \
  X(select_topk_emit)            \
  X(select_random_find)          \
  X(select_random_emit)          \
  X(gather)                      \
  X(masked_adamw)                \
  X(dense_adamw)                 \
  X(compose_workspace_bytes)     \
  X(compose)                     \
  X(restore)                     \
  X(merge_workspace_bytes)       \
  X(merge_count)                 \
  X(merge_fill)                  \
  X(reduce)                      \
  X(overlap)                     \
  X(anchor_l1)                   \
  X(digest)                      \
  X(check_support)               \
  X(hash_pieces)
#endif

#define SFT_DECLARE(op) decltype(::sft_cpu_##op) op;

namespace sft::SFT_ISA {
SFT_OPS(SFT_DECLARE)
}  // namespace sft::SFT_ISA

#undef SFT_DECLARE
