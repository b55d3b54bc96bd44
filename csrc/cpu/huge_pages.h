// Large pages for memory that is about to be written for the first time: with small ones the faults
// take longer than the writes.
#ifndef SPARSE_FT_CPU_HUGE_PAGES_H
#define SPARSE_FT_CPU_HUGE_PAGES_H

#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sft::SFT_ISA {
namespace {

// A hint for the large pages that lie within the memory; without them nothing happens.
inline void expect_writes(void *memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace
}  // namespace sft::SFT_ISA

#endif
