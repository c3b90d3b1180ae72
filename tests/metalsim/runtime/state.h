// The state of a run, in the process that runs it.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "launch.h"

constexpr unsigned max_threads = 1024, lanes = 32, max_simdgroups = max_threads / lanes;
constexpr size_t stack_size = 128 * 1024, page = 4096;
constexpr size_t threadgroup_limit = 32768, threadgroup_size = 2 * threadgroup_limit;  // the latter with gaps

enum State : uint8_t { Ready, AtExchange, AtSimdBarrier, AtBarrier, Finished };

struct Fiber {
  void* stack_pointer;
  uintptr_t site;  // the site of the last call of the runtime
  State state;
  uint8_t whole;
  unsigned flags, size;
  msl_lanes* lanes;
  alignas(64) unsigned char value[64];
  msl_thread thread;
};

struct Simdgroup {
  unsigned first, count, next, parity;
  unsigned epoch[3];  // by memory flag: how many barriers of this SIMD-group ordered that memory
  unsigned char order[lanes];
  msl_lanes lanes_of[2];
};

struct Doubt {  // a read of unwritten memory, kept until the threadgroup ends, because a later write makes it a race
  uintptr_t site;
  char text[512];
};

struct Run {
  const Launch* launch;
  Report* report;
  void* pointers[64];
  unsigned char* arena;
  unsigned char* stacks;
  Fiber fibers[max_threads];
  Simdgroup simdgroups[max_simdgroups];
  unsigned simdgroup_order[max_simdgroups];
  unsigned threads, simdgroup_count, cursor, group_index;
  unsigned epoch[3];  // by memory flag: how many barriers of the threadgroup ordered that memory
  Fiber* current;
  void* main_stack_pointer;
  uint64_t random;
  Doubt doubt;
};

extern Run run;

// Writes the report and ends the process. A doubt is reported first, since later faults may result from it. A race
// explains a doubt and is reported instead.
[[noreturn]] void fail(uintptr_t site, const char* format, ...) __attribute__((format(printf, 2, 3)));
uint32_t line_of(uintptr_t site);
const char* thread_name(const msl_thread& thread);

void run_all();                           // runs the whole grid
void memory_setup();                      // maps the shadow of the buffers
void memory_start_threadgroup();          // poisons the threadgroup memory
void memory_check_written();              // checks every element of every output
uintptr_t memory_last_call();             // site of the last check, 0 in a run without checks
void memory_fault(uintptr_t site, uintptr_t address);  // after a SIGSEGV
