// The threads of a kernel: one fiber for each thread of a threadgroup, and one threadgroup after another.
#include <string.h>
#include <sys/mman.h>

#include "state.h"

Run run;

// Saves the callee's registers, stores the stack pointer in *save, and continues where `to` stopped.
extern "C" void msl_switch(void** save, void* to);
asm(R"(
  .text
  .globl msl_switch
  .type msl_switch, @function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

static unsigned random_below(unsigned n) {
  run.random = run.random * 6364136223846793005u + 1442695040888963407u;
  return unsigned((run.random >> 33) % n);
}

template <class T>
static void fill_order(T* order, unsigned n) {
  for (unsigned i = 0; i < n; i++) {
    order[i] = T(run.launch->order == Reverse ? n - 1 - i : i);
  }
  for (unsigned i = n; run.launch->order == Random && i > 1; i--) {
    unsigned j = random_below(i);
    T kept = order[i - 1];
    order[i - 1] = order[j];
    order[j] = kept;
  }
}

static void rewind(Simdgroup& group) {
  group.next = 0;
  if (run.launch->order == Random) {
    fill_order(group.order, group.count);
  }
}

// Releases the lanes that wait at one operation, with their values. Returns false if no lane waits at an operation.
static bool release_simd(Simdgroup& group) {
  Fiber* fibers = run.fibers + group.first;
  Fiber* chosen = nullptr;
  for (unsigned i = 0; i < group.count; i++) {  // the lowest address: a loop ends before later code runs
    Fiber& f = fibers[i];
    if ((f.state == AtExchange || f.state == AtSimdBarrier) && (!chosen || f.site < chosen->site)) chosen = &f;
  }
  if (!chosen) return false;
  uintptr_t site = chosen->site;
  State state = chosen->state;
  msl_lanes& out = group.lanes_of[group.parity ^= 1];
  out.active = out.reduced = 0;
  for (unsigned i = 0; i < group.count; i++) {
    Fiber& f = fibers[i];
    bool here = f.state == state && f.site == site;
    if (run.launch->check && !here && f.state != Finished) {
      fail(site, "%s reached a SIMD-group operation that %s, of the same SIMD-group, did not reach (it is at line %u)",
           thread_name(chosen->thread), thread_name(f.thread), line_of(f.site));
    }
    if (!here) continue;
    memcpy(out.values[i], f.value, f.size);
    out.active |= 1u << i;
    f.lanes = &out;
    f.state = Ready;
  }
  if (chosen->whole && out.active != 0xffffffff) {
    fail(site, "%s is in a SIMD-group operation that needs all 32 lanes (those here: %#x)", thread_name(chosen->thread),
         out.active);
  }
  if (state == AtSimdBarrier) {
    group.epoch[msl_flag_device] += (chosen->flags & msl_flag_device) != 0;
    group.epoch[msl_flag_threadgroup] += (chosen->flags & msl_flag_threadgroup) != 0;
  }
  rewind(group);
  return true;
}

// Releases all threads from a barrier when none can run. Returns false if all have finished.
static bool release_barrier() {
  Fiber* waiting = nullptr;
  for (unsigned i = 0; i < run.threads && !waiting; i++) {
    if (run.fibers[i].state == AtBarrier) waiting = &run.fibers[i];
  }
  if (!waiting) return false;
  for (unsigned i = 0; i < run.threads; i++) {
    Fiber& f = run.fibers[i];
    if (f.state == Finished) {
      fail(waiting->site, "%s waits at a threadgroup_barrier that %s never reached: it has returned",
           thread_name(waiting->thread), thread_name(f.thread));
    }
    if (f.site != waiting->site) {
      fail(waiting->site, "%s waits at a threadgroup_barrier, and %s at another one (line %u)",
           thread_name(waiting->thread), thread_name(f.thread), line_of(f.site));
    }
    f.state = Ready;
  }
  run.epoch[msl_flag_device] += (waiting->flags & msl_flag_device) != 0;
  run.epoch[msl_flag_threadgroup] += (waiting->flags & msl_flag_threadgroup) != 0;
  if (run.launch->order == Random) fill_order(run.simdgroup_order, run.simdgroup_count);
  for (unsigned i = 0; i < run.simdgroup_count; i++) rewind(run.simdgroups[i]);
  run.cursor = 0;
  return true;
}

static Fiber* next_fiber() {
  do {
    for (; run.cursor < run.simdgroup_count; run.cursor++) {
      Simdgroup& group = run.simdgroups[run.simdgroup_order[run.cursor]];
      do {
        for (; group.next < group.count; group.next++) {
          Fiber& f = run.fibers[group.first + group.order[group.next]];
          if (f.state == Ready) return &f;
        }
      } while (release_simd(group));
    }
  } while (release_barrier());
  return nullptr;
}

// Runs the next thread when the current one has to wait. Returns when the current one may continue.
static void yield() {
  Fiber* self = run.current;
  Fiber* next = next_fiber();
  if (next == self) return;
  run.current = next;
  msl_switch(&self->stack_pointer, next ? next->stack_pointer : run.main_stack_pointer);
}

static void fiber_main() {
  for (;;) {  // once for each threadgroup
    run.launch->entry(run.pointers, &run.current->thread);
    run.current->state = Finished;
    yield();
  }
}

static void wait_at(State state, uintptr_t site, unsigned flags) {
  Fiber* f = run.current;
  f->state = state;
  f->site = site;
  f->flags = flags;
  yield();
}

msl_lanes* msl_exchange(const void* value, unsigned size, int whole) {
  Fiber* f = run.current;
  memcpy(f->value, value, size);
  f->size = size;
  f->whole = whole != 0;
  wait_at(AtExchange, uintptr_t(__builtin_return_address(0)), 0);
  f->lanes->self = f->thread.lane;
  return f->lanes;
}

void msl_barrier(int simdgroup_only, int flags) {
  run.current->size = run.current->whole = 0;
  wait_at(simdgroup_only ? AtSimdBarrier : AtBarrier, uintptr_t(__builtin_return_address(0)), unsigned(flags));
}

void msl_lane_missing(unsigned lane) {
  if (run.launch->check) {
    fail(uintptr_t(__builtin_return_address(0)),
         "%s reads from lane %u of its SIMD-group, which takes no part in the operation",
         thread_name(run.current->thread), lane);
  }
}

// Converts float to bfloat, to nearest even. Clang calls this on a machine without the instruction
extern "C" __attribute__((visibility("default"))) __bf16 __truncsfbf2(float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  uint16_t top = uint16_t(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  return __builtin_bit_cast(__bf16, top);
}

static void start_threadgroup(unsigned index) {
  const Launch& launch = *run.launch;
  unsigned groups[3], position[3], size[3];
  for (int d = 0; d < 3; d++) {
    groups[d] = (launch.grid[d] + launch.group[d] - 1) / launch.group[d];
    position[d] = d == 0 ? index % groups[0] : d == 1 ? index / groups[0] % groups[1] : index / groups[0] / groups[1];
    unsigned left = launch.grid[d] - position[d] * launch.group[d];
    size[d] = left < launch.group[d] ? left : launch.group[d];
  }
  run.group_index = index;
  run.threads = size[0] * size[1] * size[2];
  run.simdgroup_count = (run.threads + lanes - 1) / lanes;
  for (unsigned i = 0; i < run.threads; i++) {
    Fiber& f = run.fibers[i];
    msl_thread& t = f.thread;
    f.state = Ready;
    unsigned at[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
    for (int d = 0; d < 3; d++) {
      t.position_in_group[d] = at[d];
      t.position_in_grid[d] = position[d] * launch.group[d] + at[d];
      t.group_position[d] = position[d];
      t.group_size[d] = size[d];
      t.dispatch_group_size[d] = launch.group[d];
      t.grid_size[d] = launch.grid[d];
      t.groups[d] = groups[d];
    }
    t.index_in_group = i;
    t.lane = i % lanes;
    t.simdgroup = i / lanes;
    t.simdgroups = run.simdgroup_count;
    t.dispatch_simdgroups = (launch.group[0] * launch.group[1] * launch.group[2] + lanes - 1) / lanes;
  }
  for (unsigned i = 0; i < run.simdgroup_count; i++) {
    Simdgroup& group = run.simdgroups[i];
    group.first = i * lanes;
    group.count = run.threads - group.first < lanes ? run.threads - group.first : lanes;
    group.next = 0;
    fill_order(group.order, group.count);
  }
  fill_order(run.simdgroup_order, run.simdgroup_count);
  run.cursor = 0;
}

static void make_stacks(unsigned threads) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  run.stacks = static_cast<unsigned char*>(mmap(nullptr, threads * stack_size, PROT_READ | PROT_WRITE, flags, -1, 0));
  if (run.stacks == MAP_FAILED) fail(0, "no memory for the threads' stacks");
  for (unsigned i = 0; i < threads; i++) {
    mprotect(run.stacks + i * stack_size, page, PROT_NONE);
    // The tops are staggered, because otherwise all stacks would use the same few cache lines most.
    uintptr_t top = uintptr_t(run.stacks + (i + 1) * stack_size) - (i % 61) * 192;
    void** frame = reinterpret_cast<void**>(top & ~uintptr_t(63)) - 1;  // as after a call
    *--frame = reinterpret_cast<void*>(fiber_main);
    run.fibers[i].stack_pointer = frame - 6;  // six registers, zero
  }
}

void run_all() {
  const Launch& launch = *run.launch;
  run.random = launch.seed * 2654435761u + 1;
  make_stacks(launch.group[0] * launch.group[1] * launch.group[2]);
  memory_setup();
  unsigned count = 1;
  for (int d = 0; d < 3; d++) count *= (launch.grid[d] + launch.group[d] - 1) / launch.group[d];
  size_t bytes = count * sizeof(unsigned) + 1;
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) fail(0, "no memory for the order of %u threadgroups", count);
  auto* order = static_cast<unsigned*>(pages);
  fill_order(order, count);
  for (unsigned i = 0; i < count; i++) {
    start_threadgroup(order[i]);
    memory_start_threadgroup();
    run.current = next_fiber();
    msl_switch(&run.main_stack_pointer, run.current->stack_pointer);
    if (run.doubt.site) fail(run.doubt.site, "%s", run.doubt.text);
  }
  if (launch.check) memory_check_written();
}
