// Threadgroup memory and, in a checked run, the check of every access: bounds, races, and reads of unwritten memory.
#include <stdio.h>
#include <string.h>
#include <link.h>
#include <sys/mman.h>

#include "state.h"

struct Stamp {  // the last access: the thread (from 1), the barriers before it, and the site
  uint32_t thread, epoch, simd_epoch, site;
};

enum { Written = 1, ManyLanes = 2, ManySimdgroups = 4, ManyGroups = 8, AtomicWrite = 16, AtomicRead = 32 };

struct Cell {  // the state of a byte
  Stamp write, read;
  uint8_t flags;
};

struct Slot {
  unsigned offset, size, item;
};

struct Region {  // the memory that contains an address
  const char* name;
  uintptr_t start;
  size_t size, item;
  Cell* cells;  // null: the memory is read-only
  const unsigned char* valid;
  int flag;  // one of mem_flags
};

struct Access {
  uintptr_t address, site;
  bool read, write, atomic;
  Region region;

  size_t element() const { return (address - region.start) / region.item; }
};

static const int anonymous = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
static Cell* buffer_cells[64];
alignas(4096) static unsigned char threadgroup_memory[threadgroup_size];
static Cell threadgroup_cells[threadgroup_size];
constexpr unsigned max_slots = 256;
static Slot slots[max_slots];
static unsigned slot_count, threadgroup_used, threadgroup_counted;
static uintptr_t image_start, image_end, last_call;

static Region buffer_region(unsigned i) {
  const Buffer& b = run.launch->buffers[i];
  return {b.name, uintptr_t(run.pointers[i]) - b.pointer, b.size, b.item, buffer_cells[i], b.valid, msl_flag_device};
}

static Region slot_region(unsigned i) {
  const Slot& s = slots[i];
  return {run.launch->slots[i], uintptr_t(threadgroup_memory) + s.offset, s.size, s.item,
          threadgroup_cells + s.offset, nullptr, msl_flag_threadgroup};
}

static int find_image(dl_phdr_info* info, size_t, void*) {
  auto entry = reinterpret_cast<uintptr_t>(run.launch->entry);
  uintptr_t start = UINTPTR_MAX, end = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& h = info->dlpi_phdr[i];
    if (h.p_type != PT_LOAD) continue;
    uintptr_t at = info->dlpi_addr + h.p_vaddr;
    if (at < start) start = at;
    if (at + h.p_memsz > end) end = at + h.p_memsz;
  }
  if (entry < start || entry >= end) return 0;
  image_start = start;
  image_end = end;
  return 1;
}

void memory_setup() {
  dl_iterate_phdr(find_image, nullptr);
  const size_t limit = size_t(4) << 30;
  size_t total = 0;
  for (unsigned i = 0; run.launch->check && i < run.launch->buffer_count; i++) {
    const Buffer& b = run.launch->buffers[i];
    if (!b.is_output) continue;
    total += b.size * sizeof(Cell);
    void* cells = total > limit ? MAP_FAILED
                                : mmap(nullptr, b.size * sizeof(Cell) + 1, PROT_READ | PROT_WRITE, anonymous, -1, 0);
    if (cells == MAP_FAILED) {
      fail(0, "to check %s takes too much memory, %zu bytes for each of its own; use smaller shapes or check=False",
           b.name, sizeof(Cell));
    }
    buffer_cells[i] = static_cast<Cell*>(cells);
    for (size_t j = 0; b.is_filled && j < b.size; j++) buffer_cells[i][j].flags = Written;
  }
}

void memory_start_threadgroup() {
  memset(threadgroup_memory, 0xff, threadgroup_used);
  if (run.launch->check) memset(threadgroup_cells, 0, threadgroup_used * sizeof(Cell));
}

void* msl_threadgroup_slot(unsigned number, unsigned size, unsigned align, unsigned item) {
  uintptr_t site = uintptr_t(__builtin_return_address(0));
  if (number >= max_slots) fail(site, "more than %u threadgroup variables", max_slots);
  Slot& slot = slots[number];
  if (slot.size == 0) {
    slot_count = number < slot_count ? slot_count : number + 1;
    unsigned gap = 64;  // between variables, so that an access just beyond one does not reach the next
    slot.offset = (threadgroup_used + gap + align - 1) / align * align;
    slot.size = size;
    slot.item = item;
    threadgroup_counted = (threadgroup_counted + align - 1) / align * align + size;
    if (threadgroup_counted > threadgroup_limit || slot.offset + size > threadgroup_size) {
      fail(site, "%u bytes of threadgroup memory with %s; a threadgroup has %zu", threadgroup_counted,
           run.launch->slots[number], threadgroup_limit);
    }
    threadgroup_used = slot.offset + size;
    memset(threadgroup_memory + slot.offset, 0xff, size);
  }
  return threadgroup_memory + slot.offset;
}

static const char* verb(bool write) {
  return write ? "writes" : "reads";
}

// The buffer or threadgroup variable nearest to an address that is outside of all of them.
static Region nearest_region(uintptr_t address, uint64_t& distance) {
  Region best = {};
  distance = UINT64_MAX;
  auto consider = [&](const Region& r) {
    uint64_t d = address < r.start ? r.start - address : address - r.start < r.size ? 0 : address - (r.start + r.size);
    if (d < distance) distance = d, best = r;
  };
  auto memory = uintptr_t(threadgroup_memory);
  bool in_threadgroup = address - memory < threadgroup_size;
  for (unsigned i = 0; !in_threadgroup && i < run.launch->buffer_count; i++) consider(buffer_region(i));
  for (unsigned i = 0; in_threadgroup && i < slot_count; i++) {
    if (slots[i].size) consider(slot_region(i));
  }
  return best;
}

[[noreturn]] static void out_of_bounds(uintptr_t site, uintptr_t address, bool write) {
  const char* who = thread_name(run.current->thread);
  uint64_t distance;
  Region r = nearest_region(address, distance);
  if (!r.name || distance > (1u << 30)) {
    fail(site, "%s %s out of bounds: memory at %#zx, where nothing is", who, verb(write), size_t(address));
  }
  bool before = address < r.start;
  long long bytes = static_cast<long long>(address - r.start), item = static_cast<long long>(r.item);
  fail(site, "%s %s out of bounds: %s[%lld], %s of %s (%zu elements)%s", who, verb(write), r.name,
       (before ? bytes - item + 1 : bytes) / item, before ? "before the start" : "beyond the end", r.name,
       r.size / r.item, distance > 4096 ? ", the nearest array" : "");
}

static uintptr_t stack_of_current() {
  return uintptr_t(run.stacks) + size_t(run.current - run.fibers) * stack_size;
}

// Returns false for memory of the thread itself and for constants of the kernel. Fails for any other memory.
static bool find_region(Region& region, uintptr_t address, unsigned size, bool write, uintptr_t site) {
  uintptr_t in_stack = address - stack_of_current();
  if (in_stack < stack_size) return false;
  uintptr_t in_group = address - uintptr_t(threadgroup_memory);
  if (in_group < threadgroup_size) {
    for (unsigned i = 0; i < slot_count; i++) {
      region = slot_region(i);
      if (slots[i].size && address >= region.start && address + size <= region.start + region.size) return true;
    }
    out_of_bounds(site, address, write);
  }
  for (unsigned i = 0; i < run.launch->buffer_count; i++) {
    region = buffer_region(i);
    if (address >= region.start && address + size <= region.start + region.size) return true;
  }
  if (!write && address >= image_start && address < image_end) return false;
  uintptr_t in_run = address - uintptr_t(&run);  // memory of the runtime that is passed to this thread
  if (in_run < sizeof run) return false;
  out_of_bounds(site, address, write);
}

static bool in_order(const Stamp& before, unsigned flag) {
  uint32_t me = run.group_index * max_threads + run.current->thread.index_in_group + 1;
  if (before.thread == 0 || before.thread == me) return true;
  if ((before.thread - 1) / max_threads != run.group_index) return false;
  if (before.epoch != run.epoch[flag]) return true;
  unsigned simdgroup = run.current->thread.simdgroup;
  if ((before.thread - 1) % max_threads / lanes != simdgroup) return false;
  return before.simd_epoch != run.simdgroups[simdgroup].epoch[flag];
}

[[noreturn]] static void race(const Access& now, const Stamp& before, bool wrote) {
  unsigned index = before.thread - 1;
  bool same_group = index / max_threads == run.group_index;
  bool same_simdgroup = same_group && index % max_threads / lanes == run.current->thread.simdgroup;
  const char* whose = same_simdgroup ? "its SIMD-group" : same_group ? "another SIMD-group" : "another threadgroup";
  fail(now.site, "race: %s %s %s[%zu], which thread %u of %s %s at line %u; nothing orders the two",
       thread_name(run.current->thread), verb(now.write), now.region.name, now.element(), index % max_threads, whose,
       wrote ? "wrote" : "read", line_of(image_start + before.site));
}

// Reads by several threads share one stamp. The flags record how far apart these threads were.
static void note_read(Cell& cell, const Stamp& now, unsigned flag) {
  const Stamp& before = cell.read;
  uint8_t many = cell.flags & ManyGroups;
  if (before.thread != 0 && before.thread != now.thread) {
    unsigned a = before.thread - 1, b = now.thread - 1;
    if (a / max_threads != b / max_threads) many |= ManyGroups;
    else if (before.epoch == run.epoch[flag]) {
      many |= cell.flags & ManySimdgroups;
      if (a / lanes != b / lanes) many |= ManySimdgroups;
      else if (before.simd_epoch == now.simd_epoch) many |= ManyLanes;
    }
  } else if (before.thread == now.thread && before.epoch == now.epoch) {
    many |= cell.flags & (before.simd_epoch == now.simd_epoch ? ManyLanes | ManySimdgroups : ManySimdgroups);
  }
  cell.flags = uint8_t((cell.flags & ~(ManyLanes | ManySimdgroups | ManyGroups)) | many);
  cell.read = now;
}

// Checks one byte of an access: reports a race with an earlier access, and records this one.
static void look(Cell& cell, const Access& a, const Stamp& now) {
  unsigned flag = unsigned(a.region.flag);
  if (a.read && !(cell.flags & Written) && !run.doubt.site) {
    run.doubt.site = a.site;
    snprintf(run.doubt.text, sizeof run.doubt.text, "%s reads %s[%zu], which nobody has written",
             thread_name(run.current->thread), a.region.name, a.element());
  }
  if (!(a.atomic && cell.flags & AtomicWrite) && !in_order(cell.write, flag)) race(a, cell.write, true);
  if (a.write && !(a.atomic && cell.flags & AtomicRead)) {
    bool same_epoch = cell.read.epoch == now.epoch;
    bool many = cell.flags & ManyGroups || (same_epoch && cell.flags & ManySimdgroups) ||
                (same_epoch && cell.read.simd_epoch == now.simd_epoch && cell.flags & ManyLanes);
    if (many || !in_order(cell.read, flag)) race(a, cell.read, false);
  }
  if (a.read && !a.write) {
    note_read(cell, now, flag);
    cell.flags = uint8_t(a.atomic ? cell.flags | AtomicRead : cell.flags & ~AtomicRead);
  }
  if (a.write) {
    cell.write = now;
    cell.flags = uint8_t((cell.flags & ~AtomicWrite) | Written | (a.atomic ? AtomicWrite : 0));
  }
}

static void access(Access a, unsigned size) {
  run.current->site = last_call = a.site;
  if (!find_region(a.region, a.address, size, a.write, a.site)) return;
  size_t offset = a.address - a.region.start;
  for (unsigned i = 0; a.region.valid && i < size; i++) {
    if (!a.region.valid[offset + i]) {
      fail(a.site, "%s reads between the elements of %s (byte %zu): it is not contiguous",
           thread_name(run.current->thread), a.region.name, offset + i);
    }
  }
  if (!a.region.cells) return;
  const msl_thread& t = run.current->thread;
  Stamp now = {run.group_index * max_threads + t.index_in_group + 1, run.epoch[a.region.flag],
               run.simdgroups[t.simdgroup].epoch[a.region.flag], uint32_t(a.site - image_start)};
  for (unsigned i = 0; i < size; i++) look(a.region.cells[offset + i], a, now);
}

void memory_check_written() {
  for (unsigned i = 0; i < run.launch->buffer_count; i++) {
    const Buffer& b = run.launch->buffers[i];
    for (size_t j = 0; b.is_output && j < b.size; j++) {
      if (!(buffer_cells[i][j].flags & Written)) {
        fail(0, "%s[%zu] was never written (output of %zu elements)", b.name, j / b.item, b.size / b.item);
      }
    }
  }
}

uintptr_t memory_last_call() {
  return last_call;
}

void memory_fault(uintptr_t site, uintptr_t address) {
  if (!run.current) fail(site, "the simulator touched %#zx", size_t(address));
  uintptr_t in_stacks = address - uintptr_t(run.stacks);
  if (in_stacks < max_threads * stack_size && in_stacks % stack_size < page) {
    fail(site, "stack overflow in %s: more than %zu KB", thread_name(run.current->thread), stack_size / 1024);
  }
  out_of_bounds(site, address, false);
}

#define CALLER uintptr_t(__builtin_return_address(0))
#define EXPORT extern "C" __attribute__((visibility("default"))) void

void msl_atomic_access(const void* address, unsigned size, int kind) {
  if (!run.launch->check) return;
  access({uintptr_t(address), CALLER, kind != msl_atomic_store, kind != msl_atomic_load, true, {}}, size);
}

unsigned long msl_atomic_read(const void* address, unsigned size) {
  unsigned long bits = 0;
  memcpy(&bits, address, size);
  return bits;
}

void msl_atomic_write(void* address, unsigned size, unsigned long bits) {
  memcpy(address, &bits, size);
}

// Clang calls these functions before every load and store of a checked kernel, and when a sanitizer finds a fault.
#define ACCESS(bytes)                                                                                              \
  EXPORT __sanitizer_cov_load##bytes(void* p) { access({uintptr_t(p), CALLER, true, false, false, {}}, bytes); }  \
  EXPORT __sanitizer_cov_store##bytes(void* p) { access({uintptr_t(p), CALLER, false, true, false, {}}, bytes); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

#define FINDING(name, text) \
  EXPORT __ubsan_handle_##name##_minimal() { fail(CALLER, "%s: %s", thread_name(run.current->thread), text); }
FINDING(out_of_bounds, "array index out of bounds")
FINDING(type_mismatch, "an address that its type does not allow: not a multiple of its alignment")
FINDING(divrem_overflow, "integer division by zero")
FINDING(float_cast_overflow, "a float that the integer type cannot hold is converted to it")
