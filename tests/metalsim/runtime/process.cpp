// A run in a separate process, and its report.
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include "state.h"

uint32_t line_of(uintptr_t site) {
  uint32_t line = 0;
  uintptr_t best = 0;
  for (const Site* s = run.launch->sites; s && s->address; s++) {
    if (s->address <= site && s->address >= best && s->line) {
      best = s->address;
      line = uint32_t(s->line);
    }
  }
  return line;
}

void fail(uintptr_t site, const char* format, ...) {
  if (run.doubt.site && strncmp(format, "race", 4) != 0) {
    site = run.doubt.site;
    memcpy(run.report->text, run.doubt.text, sizeof run.doubt.text);
  } else {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(run.report->text, sizeof run.report->text, format, arguments);
    va_end(arguments);
  }
  run.report->line = line_of(site);
  run.report->failed = 1;
  _exit(1);
}

const char* thread_name(const msl_thread& t) {
  static char names[4][96];
  static unsigned turn;
  char* name = names[turn++ % 4];
  snprintf(name, sizeof names[0], "thread (%u, %u, %u) of threadgroup (%u, %u, %u)", t.position_in_group[0],
           t.position_in_group[1], t.position_in_group[2], t.group_position[0], t.group_position[1],
           t.group_position[2]);
  return name;
}

static void on_signal(int number, siginfo_t* info, void* context) {
  uintptr_t at = uintptr_t(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  if (uintptr_t call = memory_last_call()) at = call;
  const char* who = run.current ? thread_name(run.current->thread) : "the simulator";
  if (number == SIGALRM) fail(at, "still running after %u s: %s", run.launch->timeout_seconds, who);
  if (number == SIGFPE) fail(at, "%s divides an integer by zero", who);
  if (number == SIGSEGV && info->si_code == SI_KERNEL) fail(at, "%s uses an address that its type does not allow", who);
  if (number == SIGSEGV || number == SIGBUS) memory_fault(at, uintptr_t(info->si_addr));
  fail(at, "%s is stopped by signal %d", who, number);
}

static void catch_signals() {
  static unsigned char stack[65536];
  stack_t alternate = {};
  alternate.ss_sp = stack;
  alternate.ss_size = sizeof stack;
  sigaltstack(&alternate, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  const int caught[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGALRM};
  for (int number : caught) sigaction(number, &action, nullptr);
  itimerval timer = {};
  timer.it_value.tv_sec = run.launch->timeout_seconds;
  setitimer(ITIMER_REAL, &timer, nullptr);
}

// Each buffer is followed by so much unmapped memory that an index off by millions does not reach the next buffer.
static size_t place_buffers(const Launch& launch, size_t* offsets) {
  const size_t apart = size_t(1) << 32;
  size_t at = apart;
  for (unsigned i = 0; i < launch.buffer_count; i++) {
    const Buffer& b = launch.buffers[i];
    size_t size = (b.phase + b.size + 63) / 64 * 64;
    size_t pages = (size + page - 1) / page * page;
    offsets[i] = at + pages - size + b.phase;
    at += pages + apart;
  }
  return at;
}

// Maps memory that this process shares with the process of the run, at a given address or anywhere.
static void* share(void* place, size_t size) {
  const int flags = MAP_SHARED | MAP_ANONYMOUS | (place ? MAP_FIXED : 0);
  return mmap(place, size, PROT_READ | PROT_WRITE, flags, -1, 0);
}

// Returns 0 if the outputs are in the buffers' data, and 1 if the report describes a fault.
extern "C" __attribute__((visibility("default"))) int msl_run(const Launch* launch, Report* report) {
  size_t offsets[64];
  size_t size = place_buffers(*launch, offsets);
  void* shared = share(nullptr, sizeof(Report));
  void* arena = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  bool mapped = shared != MAP_FAILED && arena != MAP_FAILED;
  run.launch = launch;
  run.report = static_cast<Report*>(shared);
  run.arena = static_cast<unsigned char*>(arena);
  for (unsigned i = 0; mapped && i < launch->buffer_count; i++) {
    const Buffer& b = launch->buffers[i];
    size_t start = offsets[i] / page * page;
    mapped = share(run.arena + start, offsets[i] + b.size - start) != MAP_FAILED;
    if (!mapped) break;
    run.pointers[i] = run.arena + offsets[i] + b.pointer;
    if (!b.is_output || b.is_filled) memcpy(run.arena + offsets[i], b.data, b.size);
    else memset(run.arena + offsets[i], 0xff, b.size);
  }
  if (!mapped) {
    snprintf(report->text, sizeof report->text, "no memory for the buffers (%zu bytes of addresses)", size);
    return 1;
  }
  pid_t child = fork();
  if (child == 0) {
    catch_signals();
    run_all();
    _exit(0);
  }
  int status = -1;
  while (child > 0 && waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  *report = *run.report;
  if (status != 0 && !report->failed) {
    snprintf(report->text, sizeof report->text, "the simulator's process ended with status %d", status);
  }
  for (unsigned i = 0; status == 0 && i < launch->buffer_count; i++) {
    const Buffer& b = launch->buffers[i];
    if (b.is_output) memcpy(b.data, run.arena + offsets[i], b.size);
  }
  munmap(arena, size);
  munmap(shared, sizeof(Report));
  return status != 0;
}
