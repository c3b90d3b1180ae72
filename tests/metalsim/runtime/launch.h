// The interface between Python and the runtime. tests/metalsim/launch.py mirrors it.
#pragma once

#include <stdint.h>

#include "../shim/abi.h"

struct Site {  // origin of an instrumented instruction; the compiler's output ends with a table of these
  uintptr_t address;
  uint64_t line;  // line of the kernel's text; 0: not in the kernel
};

struct Buffer {
  const char* name;
  uint64_t size, item, pointer;  // bytes; bytes of an element; offset of the element the kernel's pointer points to
  uint64_t phase;                // offset from a multiple of 64, because a slice may start anywhere
  unsigned char* data;
  const unsigned char* valid;    // for each byte 0 or 1, 0 between the elements of a strided array; null: all are 1
  uint32_t is_output, is_filled;
};

struct Launch {
  void (*entry)(void* const* buffers, const msl_thread* thread);
  const Site* sites;
  const char* const* slots;  // names of the threadgroup variables
  Buffer* buffers;
  uint32_t buffer_count, check, order, seed, timeout_seconds;
  uint32_t grid[3], group[3];
};

enum Order { Forward, Reverse, Random };

struct Report {
  uint32_t failed, line;
  char text[1024];
};
