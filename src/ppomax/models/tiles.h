// Tiles of bf16, 16 rows of 64 bytes, on processors that multiply them (AMX).

#pragma once

#include "compiled.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(MASKED) && defined(__linux__)
#define TILES
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t SIDE = 16;  // rows of a tile

// Linux lends tiles to processes that ask; false where it does not.
inline bool may_use_tiles() {
  static const bool may = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM
  return may;
}

// Compilers do not know what tiles read: what was written before is to lie in memory.
inline void settle() { asm volatile("" ::: "memory"); }

// Sets up tiles 0 to 3 for sums, [above, below] x 2, 4 and 5 for the left side, 6 and 7 for the right
// one; in the end they are what they were, for oneDNN may remember how it left them.
struct Tiles {
  struct alignas(64) Setting {
    uint8_t palette = 1, start = 0, none[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Setting before, now;

  Tiles() {
    settle();
    _tile_storeconfig(&before);
    settle();
  }
  ~Tiles() {
    settle();
    if (before.palette)
      _tile_loadconfig(&before);
    else
      _tile_release();
  }
  void set(int64_t above, int64_t below) {  // rows
    const int64_t rows[] = {above, above, below, below, above, below, SIDE, SIDE};
    if (now.bytes[0] && now.rows[0] == above && now.rows[2] == below) return;
    for (int i = 0; i < 8; i++) now.rows[i] = uint8_t(rows[i]), now.bytes[i] = rows[i] ? 64 : 0;
    settle();
    _tile_loadconfig(&now);
  }
};

}  // namespace
#endif
