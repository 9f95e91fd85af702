// Threads of a block as fibers: each runs until it waits, at a barrier or for the other lanes of its warp.
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>
#include <ucontext.h>

#include "emulator.h"

EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

// The kernel with its parameters, from the translation unit of the generated source.
extern "C" void emulated_kernel(void** parameters);

namespace emulator {

Thread* current;
unsigned block_epoch;
unsigned warp_epochs[kMaxThreads / kWarp];

namespace {

Thread threads[kMaxThreads];
jmp_buf contexts[kMaxThreads], scheduler, failure;
bool started[kMaxThreads];
int order[kMaxThreads], place[kMaxThreads];
int count;
void** parameters;
char* message;
size_t message_bytes;

Thread* next_ready() {
  int from = current ? place[current->number] : 0;
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[order[(from + i) % count]];
    if (thread.state == State::Ready) return &thread;
  }
  return nullptr;
}

[[noreturn]] void body();

[[noreturn]] void resume(Thread* thread) {
  if (!thread) _longjmp(scheduler, 1);
  current = thread;
  threadIdx = {(unsigned)thread->number, 0, 0};
  int n = thread->number;
  if (started[n]) _longjmp(contexts[n], 1);
  started[n] = true;
  if (!thread->stack) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("there is no memory for the threads' stacks");
    thread->stack = (uint8_t*)memory;
  }
  static ucontext_t fresh;
  getcontext(&fresh);
  fresh.uc_stack.ss_sp = thread->stack;
  fresh.uc_stack.ss_size = kStack;
  fresh.uc_link = nullptr;
  makecontext(&fresh, body, 0);
  setcontext(&fresh);
  __builtin_unreachable();
}

__attribute__((noinline)) void yield() {
  Thread* next = next_ready();
  if (next == current) return;
  if (!_setjmp(contexts[current->number])) resume(next);
}

void body() {
  for (;;) {
    emulated_kernel(parameters);
    end_thread(*current);
    current->state = State::Done;
    yield();
  }
}

// Nobody can go on: everyone is at the same barrier, or the kernel is wrong.
void release() {
  const Thread* at = nullptr;
  const Thread* done = nullptr;
  for (int i = 0; i < count; ++i) {
    const Thread& thread = threads[i];
    if (thread.state == State::AtWarp)
      fail("thread %d waits in %s for lanes of its warp that never come", i, thread.what);
    (thread.state == State::Done ? done : at) = &thread;
  }
  if (!at) return;
  if (done) fail("thread %d waits at a barrier, and thread %d has returned", at->number, done->number);
  for (int i = 0; i < count; ++i) {
    if (threads[i].site != at->site) fail("threads %d and %d wait at different barriers", i, at->number);
    threads[i].state = State::Ready;
  }
  ++block_epoch;
}

void run_block(unsigned seed, size_t shared) {
  block_epoch = 0;
  memset(warp_epochs, 0, sizeof warp_epochs);
  begin_block(shared);
  for (int i = 0; i < count; ++i) order[i] = i;
  for (int i = count - 1; seed && i > 0; --i) {
    seed = seed * 1664525u + 1013904223u;
    std::swap(order[i], order[(seed >> 8) % (i + 1)]);
  }
  for (int i = 0; i < count; ++i) {
    place[order[i]] = i;
    threads[i].number = i;
    threads[i].state = State::Ready;
    threads[i].groups.clear();
    threads[i].copies.clear();
  }
  bool finished = false;
  while (!finished) {
    current = nullptr;
    if (!_setjmp(scheduler)) resume(next_ready());
    current = nullptr;
    release();
    finished = next_ready() == nullptr;
  }
}

}  // namespace

void fail(const char* format, ...) {
  int used = snprintf(message, message_bytes, "block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
  if (current) used += snprintf(message + used, message_bytes - used, ", thread %d", current->number);
  used += snprintf(message + used, message_bytes - used, ": ");
  va_list rest;
  va_start(rest, format);
  vsnprintf(message + used, message_bytes - used, format, rest);
  va_end(rest);
  // The fibers are left as they are and begin anew.
  memset(started, 0, sizeof started);
  _longjmp(failure, 1);
}

void collective(const char* what, const void* site, void (*act)(Thread** lanes)) {
  Thread* me = current;
  me->what = what;
  me->site = site;
  me->state = State::AtWarp;
  Thread* lanes[kWarp];
  int first = me->warp() * kWarp;
  if (first + kWarp > count) fail("%s in a warp that is not whole", what);
  for (int i = 0; i < kWarp; ++i) {
    lanes[i] = &threads[first + i];
    if (lanes[i]->state != State::AtWarp) return yield();
  }
  for (Thread* lane : lanes)
    if (lane->site != site) fail("lanes %d and %d of a warp wait at different places", lane->lane(), me->lane());
  act(lanes);
  for (Thread* lane : lanes) lane->state = State::Ready;
}

}  // namespace emulator

using namespace emulator;

extern "C" {

void __syncthreads() {
  current->state = State::AtBarrier;
  current->site = __builtin_return_address(0);
  yield();
}

void __syncwarp(unsigned mask) {
  if (mask != 0xffffffffu) fail("the emulator knows only whole warps");
  collective("__syncwarp", __builtin_return_address(0), [](Thread** lanes) { ++warp_epochs[lanes[0]->warp()]; });
}

// Runs `blocks` blocks of the grid (each three numbers); 0, or 1 with the reason in `text`.
int emulator_run(const unsigned* grid, const unsigned* blocks, size_t number, int threads_of_block, size_t shared,
                 unsigned seed, void** arguments, char* text, size_t text_bytes) {
  message = text;
  message_bytes = text_bytes;
  parameters = arguments;
  count = threads_of_block;
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {(unsigned)count, 1, 1};
  current = nullptr;
  if (_setjmp(failure)) return 1;
  if (count < 1 || count > kMaxThreads) fail("a block has 1 to %d threads, not %d", kMaxThreads, count);
  for (size_t i = 0; i < number; ++i) {
    blockIdx = {blocks[3 * i], blocks[3 * i + 1], blocks[3 * i + 2]};
    run_block(seed ? seed + (unsigned)i : 0, shared);
  }
  return 0;
}
}
