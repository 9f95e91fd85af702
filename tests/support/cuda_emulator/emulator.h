// What the emulator's own files share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "device.h"

namespace emulator {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStack = 128 << 10;
constexpr size_t kMaxShared = 228 << 10;

struct Copy {
  uint8_t* to;
  const uint8_t* from;
  int bytes;
};

enum class State { Ready, AtBarrier, AtWarp, Done };

struct Thread {
  int number = 0;
  State state = State::Done;
  const void* site = nullptr;       // of the barrier or the collective that it waits at
  const char* what = "";            // its name
  void* operands[4] = {};           // of a collective
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
  std::vector<Copy> copies;         // not committed
  uint8_t* stack = nullptr;

  int warp() const { return number / kWarp; }
  int lane() const { return number % kWarp; }
};

// fibers.cpp
extern Thread* current;
extern unsigned block_epoch;           // barriers of the block so far
extern unsigned warp_epochs[kMaxThreads / kWarp];
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Waits for the warp's other lanes; `act` is called once, with all lanes, when the last of them has come.
void collective(const char* what, const void* site, void (*act)(Thread** lanes));

// memory.cpp
void begin_block(size_t shared_bytes);
void end_thread(Thread& thread);
void access(const Thread& thread, const void* address, size_t bytes, bool store);

}  // namespace emulator
