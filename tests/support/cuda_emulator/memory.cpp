// Every access to memory: within its buffer, aligned, and in shared memory neither raced for nor unwritten.
#include <cstring>

#include "emulator.h"

#ifndef SHARED_NAME
#define SHARED_NAME emulated_shared
#endif

// `extern __shared__ ... SHARED_NAME[]` of the kernel; its type there does not matter to the linker.
alignas(1024) uint8_t SHARED_NAME[emulator::kMaxShared];

namespace emulator {
namespace {

struct Buffer {
  char name[32];
  uint8_t* begin;
  size_t bytes;
  uint8_t* writes;  // one count for each byte; null: only read
};

constexpr int kMaxBuffers = 16;
Buffer buffers[kMaxBuffers];
int buffer_count;
size_t shared_bytes;

constexpr int kNobody = -1, kManyOfWarp = -2, kMany = -3;

// When a byte of shared memory was last written and read: by whom, and after which barriers.
struct Moment {
  int who = kNobody;
  int warp = 0;
  unsigned block_epoch = 0, warp_epoch = 0;
};

struct Cell {
  Moment write, read;
  bool pending = false;  // a copy to it is under way
};

Cell cells[kMaxShared];

bool before(const Moment& moment, const Thread& thread) {
  if (moment.who == kNobody || moment.who == thread.number || moment.block_epoch < block_epoch) return true;
  return moment.who != kMany && moment.warp == thread.warp() && moment.warp_epoch < warp_epochs[moment.warp];
}

Moment now(const Thread& thread) { return {thread.number, thread.warp(), block_epoch, warp_epochs[thread.warp()]}; }

void note_read(Cell& cell, const Thread& thread) {
  Moment moment = now(thread);
  if (!before(cell.read, thread)) {
    bool same = cell.read.who != kMany && cell.read.warp == moment.warp;
    moment.who = same ? kManyOfWarp : kMany;
  }
  cell.read = moment;
}

void shared_access(const Thread& thread, size_t at, size_t bytes, bool store) {
  for (size_t i = at; i < at + bytes; ++i) {
    Cell& cell = cells[i];
    const char* how = store ? "writes" : "reads";
    if (cell.pending)
      fail("%s byte %zu of shared memory while thread %d's copy to it is under way", how, i, cell.write.who);
    if (!store && cell.write.who == kNobody) fail("reads byte %zu of shared memory, which nobody wrote", i);
    if (!before(cell.write, thread))
      fail("race: %s byte %zu of shared memory, which thread %d wrote since the last barrier", how, i, cell.write.who);
    if (store && !before(cell.read, thread))
      fail("race: writes byte %zu of shared memory, which another thread (%d) read since the last barrier", i,
           cell.read.who);
    if (store)
      cell.write = now(thread);
    else
      note_read(cell, thread);
  }
}

void global_access(const uint8_t* address, size_t bytes, bool store) {
  for (int i = 0; i < buffer_count; ++i) {
    const Buffer& buffer = buffers[i];
    if (address < buffer.begin || address >= buffer.begin + buffer.bytes) continue;
    size_t at = address - buffer.begin;
    if (at + bytes > buffer.bytes)
      fail("%s %zu bytes at %zu of %s, which has %zu", store ? "writes" : "reads", bytes, at, buffer.name, buffer.bytes);
    if (store && !buffer.writes) fail("writes %s at byte %zu, which is only to be read", buffer.name, at);
    for (size_t j = at; buffer.writes && j < at + bytes; ++j) {
      if (store && buffer.writes[j]++) fail("writes byte %zu of %s a second time", j, buffer.name);
      if (!store && !buffer.writes[j]) fail("reads byte %zu of %s, which nobody wrote", j, buffer.name);
    }
    return;
  }
  const Buffer* nearest = nullptr;
  std::ptrdiff_t least = 0;
  for (int i = 0; i < buffer_count; ++i) {
    std::ptrdiff_t at = address - buffers[i].begin, distance = at < 0 ? -at : at;
    if (!nearest || distance < least) nearest = &buffers[i], least = distance;
  }
  fail("%s %zu bytes outside every buffer, %td from the beginning of %s (%zu bytes)", store ? "writes" : "reads", bytes,
       nearest ? address - nearest->begin : (std::ptrdiff_t)0, nearest ? nearest->name : "none", nearest ? nearest->bytes : 0);
}

bool in_shared(const uint8_t* p) { return p >= SHARED_NAME && p < SHARED_NAME + kMaxShared; }

void perform(Thread& thread, const Copy& copy) {
  size_t at = copy.to - SHARED_NAME;
  memset(copy.to, 0, 16);
  memcpy(copy.to, copy.from, copy.bytes);
  for (size_t i = at; i < at + 16; ++i) {
    cells[i].pending = false;
    cells[i].write = now(thread);
  }
}

}  // namespace

void access(const Thread& thread, const void* address, size_t bytes, bool store) {
  auto p = (const uint8_t*)address;
  if (p >= thread.stack && p + bytes <= thread.stack + kStack) return;
  auto index = (const uint8_t*)&threadIdx;
  if (!store && ((p >= index && p < index + sizeof threadIdx) || p == (const uint8_t*)&blockIdx.x ||
                 p == (const uint8_t*)&blockIdx.y || p == (const uint8_t*)&blockIdx.z))
    return;
  if ((bytes & (bytes - 1)) == 0 && (uintptr_t)p % bytes)
    fail("%s %zu bytes at an address that is no multiple of it", store ? "writes" : "reads", bytes);
  if (!in_shared(p)) return global_access(p, bytes, store);
  size_t at = p - SHARED_NAME;
  if (at + bytes > shared_bytes)
    fail("%s %zu bytes at %zu of shared memory, which has %zu", store ? "writes" : "reads", bytes, at, shared_bytes);
  shared_access(thread, at, bytes, store);
}

void begin_block(size_t bytes) {
  if (bytes > kMaxShared) fail("a block has at most %zu bytes of shared memory, not %zu", kMaxShared, bytes);
  shared_bytes = bytes;
  for (size_t i = 0; i < bytes; ++i) cells[i] = Cell();
  memset(SHARED_NAME, 0xff, sizeof SHARED_NAME);
}

void end_thread(Thread& thread) {
  if (!thread.copies.empty()) fail("returns with copies that are in no group");
  for (auto& group : thread.groups)
    if (!group.empty()) fail("returns with copies under way");
}

}  // namespace emulator

using namespace emulator;

extern "C" {

void emulator_forget_buffers() { buffer_count = 0; }

int emulator_add_buffer(const char* name, void* begin, size_t bytes, uint8_t* writes) {
  if (buffer_count == kMaxBuffers) return 1;
  Buffer& buffer = buffers[buffer_count++];
  buffer = {"", (uint8_t*)begin, bytes, writes};
  strncpy(buffer.name, name, sizeof buffer.name - 1);
  return 0;
}

void ggp_later_copy(void* to, const void* from, int bytes) {
  auto p = (uint8_t*)to;
  if (!in_shared(p) || p + 16 > SHARED_NAME + shared_bytes) fail("copies to an address outside shared memory");
  if ((uintptr_t)p % 16 || (uintptr_t)from % 16) fail("copies 16 bytes from or to an address that is no multiple of it");
  if (bytes) global_access((const uint8_t*)from, bytes, false);
  size_t at = p - SHARED_NAME;
  shared_access(*current, at, 16, true);
  for (size_t i = at; i < at + 16; ++i) cells[i].pending = true;
  current->copies.push_back({p, (const uint8_t*)from, bytes});
}

void ggp_later_commit() {
  current->groups.push_back(std::move(current->copies));
  current->copies.clear();
}

void ggp_later_wait(int groups) {
  auto& queue = current->groups;
  while ((int)queue.size() > groups) {
    for (const Copy& copy : queue.front()) perform(*current, copy);
    queue.erase(queue.begin());
  }
}

// What the compiler calls before each access, and where arithmetic has no value.
#define EMULATED_ACCESS(bytes)                                                                            \
  void __asan_load##bytes##_noabort(void* address) { access(*current, address, bytes, false); }         \
  void __asan_store##bytes##_noabort(void* address) { access(*current, address, bytes, true); }
EMULATED_ACCESS(1)
EMULATED_ACCESS(2)
EMULATED_ACCESS(4)
EMULATED_ACCESS(8)
EMULATED_ACCESS(16)
void __asan_loadN_noabort(void* address, size_t bytes) { access(*current, address, bytes, false); }
void __asan_storeN_noabort(void* address, size_t bytes) { access(*current, address, bytes, true); }
void __asan_handle_no_return() {}

struct Place {
  const char* file;
  uint32_t line, column;
};
#define EMULATED_FAULT(name, what)                                                                      \
  void __ubsan_handle_##name##_abort(Place* place, ...) { fail(what " in line %u of the source", place->line); }
EMULATED_FAULT(out_of_bounds, "an index outside a local array")
EMULATED_FAULT(add_overflow, "an addition overflows")
EMULATED_FAULT(sub_overflow, "a subtraction overflows")
EMULATED_FAULT(mul_overflow, "a product overflows")
EMULATED_FAULT(negate_overflow, "a negation overflows")
EMULATED_FAULT(divrem_overflow, "a division by zero, or an overflow of one")
EMULATED_FAULT(shift_out_of_bounds, "a shift by more than the width")
EMULATED_FAULT(type_mismatch_v1, "an address that its type does not allow, null or not aligned,")
}
